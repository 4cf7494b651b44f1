"""The records of a recipe as tasks of its preprocessing, and where each of them stands in the store."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.annotations.records import RecordSource
from megatron_eagle.data.preparation.line_numbers import LineNumbers
from megatron_eagle.data.preparation.mixed_order import RowNumbers, Takes, match
from megatron_eagle.data.preparation.processor import Task
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class RecipeInput:
    """The records of a recipe, called lines whatever they are, and how often each is taken.

    `takes`: the order of a store that training may follow; None: that of the input.
    """

    datasets: list[Dataset]
    records: list[RecordSource]
    copies: list[np.ndarray]
    takes: Takes | None = None

    def taken(self) -> LineNumbers:
        """(data set, 0-based line) of every line that is taken at least once, in order."""
        if self.takes is not None:
            return self.takes.new_lines()
        return LineNumbers.of(map(np.flatnonzero, self.copies))

    def chunks(self, lines: LineNumbers, size: int) -> Iterator[list[Task]]:
        """Some lines with their bytes, `size` at a time; of all files one is open, where data sets are mixed
        one of each."""
        opened: dict[str, int] = {}
        for start in range(0, len(lines), size):
            tasks = []
            for source, line in lines[start : start + size]:
                dataset = self.datasets[source]
                group = "" if self.takes is None else dataset.name
                if opened.setdefault(group, source) != source:
                    self.records[opened[group]].close()
                opened[group] = source
                tasks.append(
                    Task(
                        self._raw(source, line),
                        source,
                        str(dataset.annotation),
                        line + 1,
                        dataset.root,
                        dataset.overrides,
                        dataset.conventions,
                    )
                )
            yield tasks

    def _raw(self, source: int, line: int) -> bytes | Problem | None:
        """A record's bytes, why there are none, or None for one that its worker reads."""
        records = self.records[source]
        try:
            return None if records.in_workers else records.read(line)
        except Problem as problem:
            return problem

    def final_rows(self, sources: np.ndarray, lines: np.ndarray) -> np.ndarray | None:
        """Rows of the store as numbers of the rows with these sources and 1-based lines: a data set once,
        then what it repeats, and so on.  None if nothing is repeated.
        """
        if self.takes is not None:
            numbers = RowNumbers(self.takes, [len(copies) for copies in self.copies])
            numbers.add(sources, lines, 0)
            order = numbers.of(0, len(self.takes), match(self.takes, sources, lines, 0))
            return order if len(order) > len(sources) else None
        copies = np.zeros(len(sources), np.int64)
        passes = []
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            copies[rows] = self.copies[source][lines[rows] - 1]
            passes += [rows[copies[rows] > k] for k in range(copies[rows].max())]
        return np.concatenate(passes) if passes and copies.max() > 1 else None

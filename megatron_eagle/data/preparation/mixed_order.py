"""The order of a store that training may follow: every stretch of it mixes the data sets as the whole does.

It follows from the recipe and the number of lines alone, so it is known before the first line is processed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_eagle.data.preparation.line_numbers import LineNumbers, line_keys


@dataclass(frozen=True)
class Takes:
    """The rows of a store if no line is dropped: the line of each, and whether it comes for the first time.

    `sources` int32 [n], `lines` int64 [n] from 0, `first` bool [n].
    """

    sources: np.ndarray
    lines: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.sources)

    @cached_property
    def firsts_before(self) -> np.ndarray:
        """How many lines have come before each place, int64 [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.first)])

    def part(self, begin: int, end: int) -> "Takes":
        """Some of them."""
        return Takes(self.sources[begin:end], self.lines[begin:end], self.first[begin:end])

    def new_lines(self) -> LineNumbers:
        """In the order in which they come for the first time."""
        return LineNumbers(self.sources[self.first], self.lines[self.first])


def mixed_takes(names: Sequence[str], copies: Sequence[np.ndarray]) -> Takes:
    """Spread every data set evenly over the whole.

    Any stretch of the order has of each data set its share of the rows, to within a few. A data set's lines
    keep their order; what it repeats comes after all of it was there once.

    Args:
        names: the data set of each source.
        copies: of each source, how often each of its lines is taken.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    places = []
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        passes = max((int(copies[i].max(initial=0)) for i in own), default=0)
        before = len(parts)
        for k in range(passes):
            for i in own:
                lines = np.flatnonzero(copies[i] > k).astype(np.int64)
                parts.append((np.full(len(lines), i, np.int32), lines, np.full(len(lines), k == 0)))
        n = sum(len(lines) for _, lines, _ in parts[before:])
        places.append((2 * np.arange(n) + 1) / (2 * max(1, n)))
    if not parts:
        return Takes(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, bool))
    order = np.argsort(np.concatenate(places), kind="stable")
    sources, lines, first = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
    return Takes(sources, lines, first)


class RowNumbers:
    """The number of each line's row, in the order in which lines are processed; -1: it has none (yet)."""

    def __init__(self, takes: Takes, n_lines: Sequence[int]):
        repeated = set(np.unique(takes.sources[~takes.first]).tolist())
        self._takes = takes
        self._of = {i: np.full(n, -1, np.int64) for i, n in enumerate(n_lines) if i in repeated}

    def add(self, sources: np.ndarray, lines: np.ndarray, start: int) -> None:
        """Rows of these sources and 1-based lines, numbered from `start`."""
        for source, numbers in self._of.items():
            own = np.flatnonzero(sources == source)
            numbers[lines[own] - 1] = start + own

    def of(self, begin: int, end: int, new: np.ndarray) -> np.ndarray:
        """The rows of the takes from `begin` to `end`, without those that were dropped.

        Args:
            new: number of the row of each take that is a first one; -1: dropped.
        """
        takes, numbers = self._takes, np.full(end - begin, -1, np.int64)
        first = takes.first[begin:end]
        numbers[first] = new
        for i in np.flatnonzero(~first).tolist():
            numbers[i] = self._of[int(takes.sources[begin + i])][takes.lines[begin + i]]
        kept: np.ndarray = numbers[numbers >= 0]
        return kept


def match(lines: Takes, sources: np.ndarray, numbers: np.ndarray, start: int) -> np.ndarray:
    """The row of each line that comes for the first time, int64; -1: it was dropped.

    Args:
        sources, numbers: source and 1-based line of the rows from row `start` on, which are in the order of
            the lines; there may be rows of later lines among them.
    """
    asked = line_keys(lines.sources[lines.first], lines.lines[lines.first])
    has_row = np.isin(asked, line_keys(sources, numbers.astype(np.int64) - 1))
    found = np.full(len(asked), -1, np.int64)
    found[has_row] = start + np.arange(int(has_row.sum()))
    return found

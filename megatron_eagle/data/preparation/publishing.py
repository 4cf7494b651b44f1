"""Makes the shards of a store visible to readers as soon as their lines are done and safely recorded."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_eagle.data.preparation.journal import Journal
from megatron_eagle.data.preparation.mixed_order import RowNumbers, Takes, match
from megatron_eagle.data.store.reader import SCHEMA
from megatron_eagle.data.store.shards import last_head, write_shard


class Publisher:
    """Publishes the shards of every length, going on where an earlier run stopped.

    Args:
        folder: of the store that grows.
        lengths: token limits.
        shard_rows: takes of a shard.
        n_lines: of each source.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        takes: Takes,
        lengths: tuple[int, ...],
        shard_rows: int,
        n_lines: list[int],
    ):
        self._journal, self._takes = journal, takes
        self._lengths = {
            length: _Length(folder / str(length), journal.tables(length), RowNumbers(takes, n_lines))
            for length in lengths
        }
        self._shard_rows = shard_rows

    def publish(self, rows: Mapping[int, pa.Table]) -> None:
        """Publish what is complete.

        Args:
            rows: of each length, what the journal has got since the last call.
        Raises:
            OSError: a shard cannot be written.
        """
        for length, table in rows.items():
            self._lengths[length].add(table)
        before = self._takes.firsts_before
        for one in self._lengths.values():
            while (begin := one.n_shards * self._shard_rows) < len(self._takes):
                end = min(begin + self._shard_rows, len(self._takes))
                if before[end] > self._journal.n_lines:
                    break
                one.write(begin, end, self._takes.part(begin, end))


class _Length:
    """The shards of one length."""

    def __init__(self, folder: Path, tables: Iterable[pa.Table], numbers: RowNumbers):
        self._folder, self._numbers = folder, numbers
        self._head = last_head(folder)
        self._n_rows = 0
        self._waiting = SCHEMA.empty_table()
        for table in tables:
            self.add(table)
        self._waiting = self._waiting.slice(self._head.end.first_sample)

    @property
    def n_shards(self) -> int:
        return self._head.number + 1

    def add(self, rows: pa.Table) -> None:
        sources, lines = (np.asarray(rows[name]) for name in ("source", "line"))
        self._numbers.add(sources, lines, self._n_rows)
        self._n_rows += len(rows)
        self._waiting = pa.concat_tables([self._waiting, rows])

    def write(self, begin: int, end: int, part: Takes) -> None:
        """The next shard: `part`, the takes from `begin` to `end`."""
        start = self._head.end.first_sample
        candidates = self._waiting.slice(0, int(part.first.sum()))
        sources, numbers = (np.asarray(candidates[name]) for name in ("source", "line"))
        new = match(part, sources, numbers, start)
        n_new = int((new >= 0).sum())
        takes = self._numbers.of(begin, end, new)
        self._head = write_shard(self._folder, self._head, self._waiting.slice(0, n_new), takes)
        self._waiting = self._waiting.slice(n_new)

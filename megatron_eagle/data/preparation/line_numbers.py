"""Lines of a recipe's files by (file, line), at 12 bytes each: there may be hundreds of millions."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

_BLOCK = 4096  # lines that are Python numbers at a time


def line_keys(sources: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """One number for each line of each source, int64."""
    keys: np.ndarray = (sources.astype(np.int64) << 40) + lines
    return keys


class LineNumbers(Sequence[tuple[int, int]]):
    """Pairs of a file's number and a line of it, both from 0."""

    def __init__(self, sources: np.ndarray, lines: np.ndarray) -> None:
        # A part of them is a view: parts are taken for every few lines.
        self._sources = sources.astype(np.int32, copy=False)
        self._lines = lines.astype(np.int64, copy=False)

    @classmethod
    def of(cls, lines: Iterable[np.ndarray]) -> "LineNumbers":
        """All of the first file's, then those of the second, and so on."""
        parts = list(lines)
        sources = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return cls(sources, np.concatenate([np.zeros(0, np.int64), *parts]))

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...

    @overload
    def __getitem__(self, index: slice) -> "LineNumbers": ...

    def __getitem__(self, index: int | slice) -> "tuple[int, int] | LineNumbers":
        if isinstance(index, slice):
            return LineNumbers(self._sources[index], self._lines[index])
        return int(self._sources[index]), int(self._lines[index])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, len(self), _BLOCK):
            block = slice(start, start + _BLOCK)
            yield from zip(self._sources[block].tolist(), self._lines[block].tolist(), strict=True)

    def among(self, chosen: set[tuple[int, int]]) -> "LineNumbers":
        """Those that are in `chosen`."""
        which = np.fromiter((line in chosen for line in self), bool, len(self))
        return LineNumbers(self._sources[which], self._lines[which])

"""Sequences of tokens in one file, memory mapped: Megatron's indexed-dataset format (.bin and .idx).

The files are read by `megatron.core.datasets.indexed_dataset.IndexedDataset` and the reverse; written here
so that preprocessing needs neither Megatron nor torch, and so that a repeated sample can point at the bytes
it repeats.
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_CODES: dict[np.dtype[Any], int] = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}  # of Megatron's `DType`


class TokenFileWriter:
    """Appends sequences to `prefix`.bin, after the first `n_kept` elements of a file that is there."""

    def __init__(self, prefix: Path, dtype: type, n_kept: int = 0):
        self._dtype = np.dtype(dtype)
        path = prefix.with_suffix(".bin")
        path.touch()
        self._file = path.open("r+b")
        self._file.truncate(n_kept * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    @staticmethod
    def n_elements(prefix: Path, dtype: type) -> int:
        """Whole elements that `prefix`.bin holds; 0 if there is none."""
        path = prefix.with_suffix(".bin")
        return path.stat().st_size // np.dtype(dtype).itemsize if path.exists() else 0

    def add(self, sequence: np.ndarray) -> None:
        """Append one sequence (1-D, of the writer's dtype)."""
        self._file.write(np.ascontiguousarray(sequence, self._dtype).data)

    def sync(self) -> None:
        """Return when everything added is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_token_index(
    prefix: Path, dtype: type, lengths: np.ndarray, order: np.ndarray | None = None
) -> None:
    """Write `prefix`.idx for sequences that lie in `prefix`.bin one after the other.

    Args:
        lengths: of the sequences, int32 [n], in items of `dtype`.
        order: the final rows, as numbers of sequences, which may repeat; None: as they lie.
    """
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1].astype(np.int64) * np.dtype(dtype).itemsize, out=pointers[1:])
    if order is not None:
        lengths, pointers = lengths[order], pointers[order]
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(_MAGIC + struct.pack("<QB", 1, _CODES[np.dtype(dtype)]))
        index.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
        index.write(lengths.data)
        index.write(pointers.data)
        index.write(np.arange(len(lengths) + 1, dtype=np.int64).data)  # every sequence is a document


class TokenFile:
    """Reads sequences by number, as views of the memory-mapped file; opening costs no memory."""

    def __init__(self, prefix: Path):
        try:
            with prefix.with_suffix(".idx").open("rb") as index:
                magic, _, code, count, _ = struct.unpack("<9sQBQQ", index.read(34))
            self._dtype: np.dtype[Any] = next(dtype for dtype, known in _CODES.items() if known == code)
            if magic != _MAGIC:
                raise ValueError
        except (OSError, ValueError, struct.error, StopIteration):
            raise UserError(f"{prefix}.idx is missing or no token index; preprocess the data again") from None
        raw = np.memmap(prefix.with_suffix(".idx"), np.uint8, mode="r")
        self.lengths = np.frombuffer(raw, np.int32, count, offset=34)
        self._pointers = np.frombuffer(raw, np.int64, count, offset=34 + 4 * count)
        self._data = np.memmap(prefix.with_suffix(".bin"), np.uint8, mode="r") if count else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        assert self._data is not None, "there is no row in an empty file"
        count, offset = int(self.lengths[row]), int(self._pointers[row])
        return np.frombuffer(self._data, self._dtype, count, offset=offset)

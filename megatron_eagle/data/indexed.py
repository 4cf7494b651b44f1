"""Sequences of tokens in one file, memory mapped: Megatron's indexed-dataset format (.bin and .idx).

The files are read by `megatron.core.datasets.indexed_dataset.IndexedDataset` and the reverse; written here
so that preprocessing needs neither Megatron nor torch, and so that a repeated sample can point at the bytes
it repeats.
"""

import struct
from pathlib import Path

import numpy as np

from megatron_eagle.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}  # of Megatron's `DType`


class TokenFileWriter:
    """Appends sequences to `prefix`.bin; `close` writes `prefix`.idx."""

    def __init__(self, prefix: Path, dtype: type):
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._file = prefix.with_suffix(".bin").open("wb")
        self._lengths: list[int] = []

    def add(self, sequence: np.ndarray) -> None:
        """Append one sequence (1-D, of the writer's dtype)."""
        self._file.write(np.ascontiguousarray(sequence, self._dtype).data)
        self._lengths.append(len(sequence))

    def close(self, rows: np.ndarray | None = None) -> None:
        """Finish.  `rows` lists the sequences in the order of the final rows; one may occur several times."""
        self._file.close()
        lengths = np.array(self._lengths, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        if rows is not None:
            lengths, pointers = lengths[rows], pointers[rows]
        with self._prefix.with_suffix(".idx").open("wb") as index:
            index.write(_MAGIC + struct.pack("<QB", 1, _CODES[self._dtype]))
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
            self._dtype = next(dtype for dtype, known in _CODES.items() if known == code)
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
        return np.frombuffer(self._data, self._dtype, self.lengths[row], offset=self._pointers[row])

"""The files of tensors: one per rank, hashed while it is written; and a copy in host memory to write from."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.checkpoint.content import TensorBox
from megatron_eagle.checkpoint.index import StoredBox

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Written:
    """A finished file: its manifest entry and what it holds."""

    name: str
    size: int
    sha256: str
    entries: list[StoredBox]


def write_pieces(file: Path, pieces: Iterable[TensorBox]) -> Written:
    """Write `pieces` one after the other, as `torch.load` reads them, and wait until the disk has them.

    On the way at most one piece is copied.

    Raises:
        OSError: a file cannot be written.
    """
    entries = []
    with _hashed(file) as stream:
        for piece in pieces:
            start = stream.size
            torch.save(_own_storage(piece.data), cast(BinaryIO, stream))  # it only writes and flushes
            entries.append(
                StoredBox(
                    piece.key,
                    piece.data.dtype,
                    piece.shape,
                    piece.offset,
                    tuple(piece.data.shape),
                    file.name,
                    start,
                    stream.size - start,
                )
            )
            del piece  # before the next one is made
    return Written(file.name, stream.size, stream.digest.hexdigest(), entries)


def _own_storage(tensor: Tensor) -> Tensor:
    """The values on the host in a storage that holds nothing else: `torch.save` writes whole storages."""
    tensor = tensor.detach()
    if tensor.is_cpu and tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


class _HashedFile:
    """A file to write to, as `torch.save` wants it. Keeps the system's error, of which torch says little."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, block: bytes | memoryview) -> int:
        try:
            self._file.write(block)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(block)
        size = memoryview(block).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def _hashed(path: Path) -> Iterator[_HashedFile]:
    with open(path, "wb") as file:
        stream = _HashedFile(file)
        try:
            yield stream
        except RuntimeError as error:
            raise stream.error or error from None
        file.flush()
        os.fsync(file.fileno())


class HostCopy:
    """Host memory that holds one rank's pieces, allocated once and filled anew for every save.

    `nbytes` is all of it: the size of the rank's file. On a GPU machine it is pinned.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        return self._memory.numel()

    def fill(self, pieces: Sequence[TensorBox]) -> list[TensorBox]:
        """Pieces with the values that `pieces` have now. They hold until the next call."""
        places, end = [], 0
        for piece in pieces:
            places.append(end)
            end += -(-piece.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self.nbytes < end:
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        memory: np.ndarray = self._memory.numpy()
        copies = []
        for piece, place in zip(pieces, places, strict=True):
            # Each with a storage of its own in the one memory.
            flat = torch.frombuffer(memory, dtype=piece.data.dtype, count=piece.data.numel(), offset=place)
            data = flat.view(piece.data.shape)
            data.copy_(piece.data, non_blocking=True)
            copies.append(replace(piece, data=data))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

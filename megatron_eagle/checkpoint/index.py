"""The index of a checkpoint, torch's `.metadata`: which box of which tensor lies where in which file.

It is a pickle. Reading it allows only the classes that torch writes into it.
"""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_eagle.errors import UserError

INDEX_FILE = ".metadata"


@dataclass(frozen=True)
class StoredBox:
    """One box and its place: `length` bytes of `file` from `start` on, which `torch.load` reads."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    start: int
    length: int


def write_checkpoint_index(folder: Path, entries: Iterable[StoredBox]) -> None:
    """Write the index of `entries` into `folder`.

    Raises:
        UserError: a tensor's boxes are not exactly the whole tensor (a fault of the model's description).
        OSError: cannot write.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for entry in entries:
        empty = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), [])
        whole = tensors.setdefault(entry.key, empty)
        if whole.size != entry.shape or whole.properties.dtype != entry.dtype:
            raise UserError(f"ranks disagree about the shape or type of {entry.key}")
        offset = torch.Size(entry.offset)
        whole.chunks.append(ChunkStorageMetadata(offset, torch.Size(entry.size)))
        places[MetadataIndex(entry.key, offset)] = _StorageInfo(entry.file, entry.start, entry.length)
    for key, whole in tensors.items():
        covered = sum(chunk.sizes.numel() for chunk in whole.chunks)
        overlap = len({chunk.offsets for chunk in whole.chunks}) < len(whole.chunks)
        if overlap or covered != whole.size.numel():
            raise UserError(f"{key}: the ranks hold {covered} of its {whole.size.numel()} elements")
    metadata = Metadata(dict(tensors), storage_data=places, storage_meta=StorageMeta())
    metadata.version = "1.0.0"  # from torch 2.9 on a field, which is then read
    with open(folder / INDEX_FILE, "wb") as file:
        pickle.dump(metadata, file)


class _IndexUnpickler(pickle.Unpickler):
    """Reads plain records of names, shapes, types and places, and nothing else."""

    ALLOWED = {
        "torch": {"Size"},  # and the dtypes
        "torch.serialization": {"_get_layout"},  # maps a layout's name to the layout
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # from Python 3.13 on
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(folder: Path) -> Any:
    """The checkpoint's table of tensors. Also guards Megatron's own, unrestricted read of the same file."""
    try:
        with open(folder / INDEX_FILE, "rb") as file:
            return _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        where = folder / INDEX_FILE
        raise UserError(f"{where}: not a checkpoint's index, or a damaged one: {error}") from error

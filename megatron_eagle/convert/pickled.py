"""Checkpoints in torch's own format (`pytorch_model*.bin`), read only where the user allows it."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.convert.shards import (
    DTYPES,
    FREQUENCIES,
    HF_INDEX,
    POSITIONS,
    READABLE,
    SINGLE,
    HfWeights,
    read_json,
)
from megatron_eagle.errors import UserError

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
_NAMES = {dtype: name for name, dtype in READABLE.items()}


class PickledWeights:
    """What `HfWeights` is for safetensors, with its attributes; `weight_map` names the safetensors files that
    an export would write.

    Files are unpickled by torch's restricted reader (`weights_only`), which builds tensors and runs nothing
    else, and are mapped, one at a time.

    Raises:
        UserError: a file is missing, damaged, of a format before torch 1.6, or holds anything but tensors of
            the supported types.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = self._find()
        self.weight_map = {
            name: SINGLE
            if file == _SINGLE
            else file.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            for name, file in self._files.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in sorted(set(self._files.values())):
            held = self._load(file)
            odd = held.keys() ^ {name for name, place in self._files.items() if place == file}
            if odd:
                raise UserError(
                    f"{self.folder / file}: its tensors are not those that the index names, as {min(odd)}"
                )
            for name, tensor in held.items():
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), _NAMES[tensor.dtype]

    def _find(self) -> dict[str, str]:
        if not (self.folder / _INDEX).is_file():
            return dict.fromkeys(self._load(_SINGLE), _SINGLE)
        weight_map = read_json(self.folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{self.folder / _INDEX}: it has no weight_map; copy the file again")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:  # it could point anywhere
                raise UserError(f"{self.folder / _INDEX}: {file!r} is not a file name")
        return weight_map

    def _load(self, file: str) -> dict[str, Tensor]:
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"{path}: this file of weights is missing; copy the checkpoint again")
        try:
            held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path}: damaged, or more than tensors, which is not read: {reason}") from None
        tensors = isinstance(held, dict) and all(isinstance(t, Tensor) for t in held.values())
        if not tensors or not all(_is_read(name, tensor) for name, tensor in held.items()):
            raise UserError(f"{path}: holds more than tensors of the types {', '.join(DTYPES)}")
        return dict(held)

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type, in memory of its own."""
        return self._load(self._files[name])[name].clone(memory_format=torch.contiguous_format)


def _is_read(name: str, tensor: Tensor) -> bool:
    table = name.endswith((POSITIONS, FREQUENCIES))
    return tensor.dtype in (READABLE if table else DTYPES).values()


def open_weights(folder: str | Path, *, allow_pickle: bool = False) -> HfWeights | PickledWeights:
    """The tensors of a Hugging Face folder; safetensors where there are any."""
    folder = Path(folder)
    if not allow_pickle or (folder / HF_INDEX).is_file() or (folder / SINGLE).is_file():
        return HfWeights(folder)
    return PickledWeights(folder)

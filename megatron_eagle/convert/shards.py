"""Sharded safetensors checkpoints as Hugging Face lays them out: read by name, written shard by shard."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

# safetensors' names of the types a checkpoint may hold.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        UserError: missing, unreadable, no JSON, or no object at the top level.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; the folder must be a complete Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object at the top level")
    return value


class HfWeights:
    """All tensors of a safetensors checkpoint folder; opened lazily, so nothing is in memory.

    Attributes:
        weight_map: tensor name -> file name.
        shapes, dtypes: tensor name -> shape, safetensors type name ("F32", "BF16", "F16").

    Raises:
        UserError: no weights, a shard named by the index is missing, a file is truncated or no safetensors
            file, index and files disagree, or a tensor's type is none of `DTYPES`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.weight_map = self._weight_map()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files = {}
        for file in sorted(set(self.weight_map.values())):
            self._open(file)

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.folder / INDEX}: it has no weight_map; copy the file again")
            return weight_map
        single = self.folder / SINGLE
        if not single.is_file():
            pickled = sorted(self.folder.glob("*.bin"))
            advice = f"; {pickled[0].name} is a pickle and is not read" if pickled else ""
            raise UserError(f"{self.folder}: no weights here ({SINGLE} or {INDEX}){advice}")
        try:
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{single}: truncated or not a safetensors file: {error}") from None

    def _open(self, name: str) -> None:
        path = self.folder / name
        # A name with a folder in it could point anywhere.
        if Path(name).name != name:
            raise UserError(f"{self.folder / INDEX}: {name!r} is not a file name")
        if not path.is_file():
            raise UserError(
                f"{path}: the index names this shard and it is missing; copy the checkpoint again"
            )
        try:
            file = self._files[name] = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or not a safetensors file: {error}") from None
        named = {tensor for tensor, shard in self.weight_map.items() if shard == name}
        held = set(file.keys())
        if named != held:
            odd = sorted(named ^ held)
            raise UserError(
                f"{path}: its tensors are not those that the index names, as {', '.join(odd[:4])}"
            )
        for tensor in held:
            view = file.get_slice(tensor)
            self.shapes[tensor] = tuple(view.get_shape())
            self.dtypes[tensor] = view.get_dtype()
            if self.dtypes[tensor] not in DTYPES:
                raise UserError(f"{path}: {tensor} is {self.dtypes[tensor]}; supported: {', '.join(DTYPES)}")

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type."""
        return self._files[self.weight_map[name]].get_tensor(name)


def plan_shards(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> dict[str, str]:
    """Tensor name -> file name, for tensors of `sizes` bytes in this order, at most `limit` bytes a file."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, SINGLE)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], weight_map: Mapping[str, str]) -> None:
    """Write tensors that arrive in any order; a shard is written, and its memory released, once complete.

    Also writes the index, unless the only file is `model.safetensors`.
    """
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in weight_map.values()}
    left = {file: sum(f == file for f in weight_map.values()) for file in waiting}
    total = 0
    for name, tensor in tensors:
        file = weight_map[name]
        waiting[file][name] = tensor.contiguous()
        total += tensor.numel() * tensor.element_size()
        left[file] -= 1
        if not left[file]:
            save(waiting.pop(file), folder / file)
    if waiting:
        raise ValueError(f"no tensors for {sorted(waiting)}")
    if set(weight_map.values()) != {SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions of any other new file (the library's own are 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor of a safetensors type."""
    return math.prod(shape) * DTYPES[dtype].itemsize

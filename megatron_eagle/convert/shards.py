"""Sharded safetensors checkpoints as Hugging Face lays them out: read and written tensor by tensor."""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_eagle.errors import UserError

SINGLE = "model.safetensors"
HF_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

# safetensors' names of the types a checkpoint may hold.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Tables that a configuration gives (`redundant`), by the ends of their names; they may be whole numbers.
POSITIONS, FREQUENCIES = ".position_ids", ".rotary_emb.inv_freq"
READABLE = DTYPES | {"I64": torch.int64}
_ORDER = ("F32", "BF16", "F16")


def read_json(path: Path) -> dict[str, Any]:
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
        self._starts: dict[str, int] = {}
        for file in sorted(set(self.weight_map.values())):
            self._open(file)

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / HF_INDEX).is_file():
            weight_map = read_json(self.folder / HF_INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.folder / HF_INDEX}: it has no weight_map; copy the file again")
            return weight_map
        single = self.folder / SINGLE
        if not single.is_file():
            pickled = sorted(self.folder.glob("*.bin"))
            advice = f"; {pickled[0].name} is a pickle, read only with --allow-pickle" if pickled else ""
            raise UserError(f"{self.folder}: no weights here ({SINGLE} or {HF_INDEX}){advice}")
        try:
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{single}: truncated or not a safetensors file: {error}") from None

    def _open(self, name: str) -> None:
        path = self.folder / name
        # A name with a folder in it could point anywhere.
        if Path(name).name != name:
            raise UserError(f"{self.folder / HF_INDEX}: {name!r} is not a file name")
        if not path.is_file():
            raise UserError(
                f"{path}: the index names this shard and it is missing; copy the checkpoint again"
            )
        try:
            file: Any = safe_open(path, "pt")
            with open(path, "rb") as raw:
                header_bytes = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(header_bytes))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or not a safetensors file: {error}") from None
        named = {tensor for tensor, shard in self.weight_map.items() if shard == name}
        held: set[str] = set(file.keys())
        if named != held:
            odd = sorted(named ^ held)
            raise UserError(
                f"{path}: its tensors are not those that the index names, as {', '.join(odd[:4])}"
            )
        for tensor in held:
            view = file.get_slice(tensor)
            self.shapes[tensor] = tuple(view.get_shape())
            self.dtypes[tensor] = view.get_dtype()
            self._starts[tensor] = 8 + header_bytes + header[tensor]["data_offsets"][0]
            table = tensor.endswith((POSITIONS, FREQUENCIES))
            if self.dtypes[tensor] not in (READABLE if table else DTYPES):
                raise UserError(f"{path}: {tensor} is {self.dtypes[tensor]}; supported: {', '.join(DTYPES)}")

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type. It is read, not mapped: pages of a mapped file count as memory."""
        path = self.folder / self.weight_map[name]
        tensor = torch.empty(self.shapes[name], dtype=READABLE[self.dtypes[name]])
        left = _bytes_of(tensor)
        with open(path, "rb", buffering=0) as file:
            file.seek(self._starts[name])
            while len(left):
                count = file.readinto(left)
                if not count:
                    raise UserError(f"{path}: it became shorter while it was read")
                left = left[count:]
        return tensor


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


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    weight_map: Mapping[str, str],
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Write tensors that arrive in any order, each at once to its place in its file.

    The files are byte for byte those of the safetensors library. Also writes the index, unless the only file
    is `model.safetensors`.

    Args:
        kinds: tensor name -> its safetensors type and shape, known before the tensors are.
    """
    with contextlib.ExitStack() as opened:
        files: dict[str, io.FileIO] = {}
        starts: dict[str, int] = {}
        for file in sorted(set(weight_map.values())):
            header, places, total = _header({n: kinds[n] for n, f in weight_map.items() if f == file})
            stream = files[file] = opened.enter_context(open(folder / file, "wb", buffering=0))
            _write(stream, 0, memoryview(header))
            stream.truncate(len(header) + total)
            starts |= {name: len(header) + place for name, place in places.items()}
        for name, tensor in tensors:
            dtype, shape = kinds[name]
            if tensor.dtype != DTYPES[dtype] or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
            _write(files[weight_map[name]], starts.pop(name), _bytes_of(tensor.contiguous()))
        if starts:
            raise ValueError(f"no tensors for {sorted(starts)}")
    if set(weight_map.values()) != {SINGLE}:
        total = sum(tensor_bytes(shape, dtype) for dtype, shape in kinds.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / HF_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """Header of a safetensors file, place of each tensor after it, and bytes of all tensors."""
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    # The library's order: wide types first, so that every tensor is aligned.
    for name in sorted(kinds, key=lambda name: (_ORDER.index(kinds[name][0]), name)):
        dtype, shape = kinds[name]
        places[name], end = end, end + tensor_bytes(shape, dtype)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places, end


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write(file: io.FileIO, start: int, data: memoryview) -> None:
    file.seek(start)
    while len(data):
        data = data[file.write(data) :]


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions of any other new file (the library's own are 0600)."""
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Size of a tensor of a safetensors type."""
    return math.prod(shape) * DTYPES[dtype].itemsize

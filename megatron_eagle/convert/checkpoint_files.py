"""The weights in a Megatron checkpoint, tensor by tensor: one process, no model, no process group.

What `checkpoint` saves and loads has one key for all layers of a kind, as
`language_model.decoder.layers.mlp.linear_fc2.weight`, whose first axis is the layer (and whose second is the
expert, where a layer has them). A file holds it in
chunks: boxes of the whole tensor, cut by whatever layout wrote it. Here a chunk is written as soon as its
values are known, and read where a tensor needs it, so that memory holds one tensor of one layer at a time.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_eagle.checkpoint import CONTENT_METADATA, TRACKER, TrainState, checkpoint_folder, read_index
from megatron_eagle.checkpoint.content import TensorBox
from megatron_eagle.checkpoint.files import write_pieces
from megatron_eagle.checkpoint.folder import iteration_folder
from megatron_eagle.checkpoint.saving import complete_folder
from megatron_eagle.config import to_dict
from megatron_eagle.convert.mapping import MappedTensor, ModelMapping
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig

_LAYER = re.compile(r"(.+\.layers)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


def key_of(name: str) -> tuple[str, tuple[int, ...]]:
    """Key in a checkpoint of the model's parameter `name`, and its place on the key's first axes: the layer,
    and the expert. Empty: the key is this parameter alone."""
    key, place = name, []
    if match := _LAYER.fullmatch(key):
        key, place = f"{match[1]}.{match[3]}", [int(match[2])]
    if match := _EXPERT.fullmatch(key):  # Megatron's word for all of a layer's
        key, place = f"{match[1]}.experts.{match[3]}", [*place, int(match[2])]
    return key, tuple(place)


@dataclass(frozen=True)
class Chunk:
    """One chunk to write: its box in the whole tensor `key`, and how to get its values in its turn."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]
    read: Callable[[], Tensor]

    def filled(self, dtype: torch.dtype) -> TensorBox:
        """The chunk with its values."""
        return TensorBox(self.key, self.shape, self.offset, self.read().to(dtype).reshape(self.size))


def key_shapes(plan: ModelMapping) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint of the plan's model, with its whole shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in plan.entries:
        blocks = plan.block_shapes(entry)
        own = (sum(block[0] for block in blocks), *blocks[0][1:])
        key, place = key_of(entry.model)
        shapes[key] = (*(number + 1 for number in place), *own)  # layers and experts come in order
    return shapes


def pieces_of(plan: ModelMapping, read: Callable[[str], Tensor]) -> Iterable[Chunk]:
    """The chunks of the plan's model, from a reader of HF tensors. To be written in this order."""
    shapes = key_shapes(plan)
    held: tuple[str, list[Tensor]] = ("", [])

    def block(entry: MappedTensor, number: int) -> Tensor:
        nonlocal held
        if held[0] != entry.model:
            held = (entry.model, plan.blocks(entry, read))
        return held[1][number]

    for entry in plan.entries:
        key, place = key_of(entry.model)
        row = 0
        for number, size in enumerate(plan.block_shapes(entry)):
            offset = (*place, row, *[0] * (len(size) - 1))
            row += size[0]
            size = (*[1] * len(place), *size)
            yield Chunk(key, shapes[key], offset, size, partial(block, entry, number))


def write_checkpoint(
    root: Path, config: EagleConfig, chunks: Iterable[Chunk], dtype: torch.dtype, *, iteration: int = 0
) -> None:
    """Write the chunks into the new checkpoint `root`, one after the other, as `save_checkpoint` would.

    The folder is complete once this returns; the caller sees to it that nobody finds it before.
    """
    folder = iteration_folder(root, iteration)
    folder.mkdir(parents=True)
    file = write_pieces(folder / "__0_0.distcp", (chunk.filled(dtype) for chunk in chunks))
    common = {"content_metadata": dict(CONTENT_METADATA)}
    complete_folder(folder, common, {"model": to_dict(config)}, TrainState(iteration), [file])
    (root / TRACKER).write_text(f"{iteration}\n")


class CheckpointWeights:
    """The latest weights in a checkpoint of any layout, read by parameter name.

    Attributes:
        shapes: key -> shape of the whole tensor, without the optimizer's.

    Raises:
        UserError: no checkpoint there, or a damaged index.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.folder = checkpoint_folder(checkpoint)
        index = read_index(self.folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, torch.dtype] = {}
        self._chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], object]]] = {}
        for key, tensor in index.state_dict_metadata.items():
            if key.startswith("optimizer.") or not hasattr(tensor, "chunks"):
                continue
            self.shapes[key], self._types[key] = tuple(tensor.size), tensor.properties.dtype
            sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks}
            self._chunks[key] = [(offset, size, None) for offset, size in sizes.items()]
        files = {(i.fqn, tuple(i.offset or ())): info for i, info in index.storage_data.items()}
        for key, chunks in self._chunks.items():
            self._chunks[key] = [(offset, size, files.get((key, offset))) for offset, size, _ in chunks]

    def check(self, plan: ModelMapping, adapters: Iterable[str] = ()) -> None:
        """Compare keys and shapes with those of the plan's model and the parameters `adapters` of its LoRA.

        Raises:
            UserError: keys are missing, unexpected or of another shape; some are named.
        """
        wanted: dict[str, tuple[int, ...] | None] = dict(key_shapes(plan))
        wanted |= {key_of(name)[0]: None for name in adapters}
        for names, what in (
            (wanted.keys() - self.shapes.keys(), "lacks weights that the model needs"),
            (self.shapes.keys() - wanted.keys(), "holds tensors that the model lacks"),
        ):
            if names:
                some = ", ".join(sorted(names)[:4])
                raise UserError(f"{self.folder}: the checkpoint {what} ({len(names)}): {some}")
        for key, shape in wanted.items():
            if shape is not None and self.shapes[key] != shape:
                raise UserError(f"{self.folder}: {key} has shape {self.shapes[key]}, the model's is {shape}")

    def read(self, name: str) -> Tensor:
        """One parameter by the model's name for it, whole, in the type it is stored in.

        Raises:
            UserError: a file is missing or damaged, or does not hold all of it.
        """
        key, _ = key_of(name)
        chunks = [
            (o, size, partial(self._read_chunk, key, file, size)) for o, size, file in self._chunks[key]
        ]
        result = put_together(name, self.shapes[key], chunks)
        if result is None:
            raise UserError(f"{self.folder}: its files do not hold all of {name}; copy the checkpoint again")
        return result

    def _read_chunk(self, key: str, file: Any, size: tuple[int, ...]) -> Tensor:
        name = getattr(file, "relative_path", "")
        # A name with a folder in it could point anywhere.
        if not name or Path(name).name != name:
            raise UserError(f"{self.folder / '.metadata'}: {key} lies in {name!r}, which is no file name")
        path = self.folder / name
        try:
            with open(path, "rb") as stream:
                view: Any = _create_file_view(stream, file.offset, file.length)
                tensor: Tensor = torch.load(view, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: missing; copy the checkpoint again") from None
        except Exception as error:  # whatever torch finds wrong with the bytes
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: damaged, {key} cannot be read: {reason}") from error
        if tuple(tensor.shape) != size or tensor.dtype != self._types[key]:
            raise UserError(f"{path}: damaged, {key} has another shape or type than the index says")
        return tensor


def put_together(
    name: str,
    shape: tuple[int, ...],
    chunks: Iterable[tuple[tuple[int, ...], tuple[int, ...], Callable[[], Tensor]]],
) -> Tensor | None:
    """The model's parameter `name` out of those chunks of its key that hold some of it; None: not all of it.

    Args:
        shape: of the key's whole tensor.
        chunks: offset, size and reader of each. Only a chunk that is needed is read, one at a time.
    """
    _, place = key_of(name)
    start = (*place, *[0] * (len(shape) - len(place)))
    size = (*[1] * len(place), *shape[len(place) :])
    result, found = None, 0
    for offset, extent, read in chunks:
        low = [max(a, b) for a, b in zip(start, offset, strict=True)]
        ends = zip(start, size, offset, extent, strict=True)
        high = [min(a + n, b + m) for a, n, b, m in ends]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        chunk = read()
        if extent == size and offset == start:
            result, found = chunk, chunk.numel()
            break
        if result is None:
            result = chunk.new_empty(size)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        part = chunk[_shifted(box, offset)]
        result[_shifted(box, start)] = part
        found += part.numel()
    if result is None or found != result.numel():
        return None
    return result.reshape(shape[len(place) :])


def _shifted(box: tuple[slice, ...], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(s.start - o, s.stop - o) for s, o in zip(box, origin, strict=True))

"""What a rank saves and asks for: tensors under keys that know no rank, in boxes of the whole tensor.

A rank saves the parameters of which it holds the first copy, and the optimizer state of exactly the elements
that it updates. The distributed optimizer cuts the parameters of a rank, one after the other, into equal
runs of elements; a run cuts through at most two parameters, and such a parameter's part is a few boxes. So
ranks exchange nothing and gather nothing to save, whereas Megatron's own way for this format
(`fully_reshardable`) gathers the whole optimizer state of a model-parallel rank on each data parallel rank.
The files are the same to a reader.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

# What Megatron is told of every checkpoint, when it saves and when it loads.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

_OPTIMIZER_STATE = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TensorBox:
    """A box of the whole tensor `key`, with this rank's values."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of the box in it
    data: Tensor  # in the box's shape, on any device


def unwrapped(models: Sequence[torch.nn.Module]) -> list[tuple[str, Any]]:
    """Model chunks without wrappers. The name only tells the chunks of this rank apart: keys in the
    checkpoint carry global layer numbers, so chunks of another pipeline layout find theirs."""
    chunks = []
    for index, model in enumerate(models):
        inner: Any = model
        while not hasattr(inner, "sharded_state_dict") or hasattr(inner, "ddp_config"):
            inner = inner.module
        chunks.append((f"model{index}", inner))
    return chunks


def model_content(models: Sequence[torch.nn.Module]) -> dict[str, dict[str, Any]]:
    """Megatron's description of this rank's chunks: parameters with their global key, shape and place."""
    content = {}
    for name, model in unwrapped(models):
        tensors = model.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        # TransformerEngine adds pickled `_extra_state` objects (FP8 scales). Without them a checkpoint is
        # tensors only and fits specs with and without TransformerEngine.
        content[name] = {k: v for k, v in tensors.items() if not isinstance(v, ShardedObject)}
    return content


def content_to_load(models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """Megatron's description of everything that this rank wants from a checkpoint."""
    content: dict[str, Any] = model_content(models)
    if optimizer is not None:
        # Megatron adds to the metadata it is given: hand out copies.
        content["optimizer"] = optimizer.sharded_state_dict(
            dict(content), is_loading=True, metadata=dict(CONTENT_METADATA)
        )
        for part in optimizer_parts(content["optimizer"]):
            if not part["param_state"]:
                del part["param_state"]  # nothing of it trains on this rank
    return content


def content_to_save(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
) -> tuple[list[TensorBox], dict[str, Any]]:
    """The pieces that this rank writes, with values that training will change in place; and plain values,
    which are everybody's but for the optimizer's step (a rank on which nothing trains has none)."""
    common: dict[str, Any] = {"content_metadata": dict(CONTENT_METADATA)}
    if scheduler is not None:
        common["scheduler"] = scheduler.state_dict()
    content = model_content(models)
    pieces = [
        TensorBox(t.key, tuple(t.global_shape), tuple(t.global_offset), _with_box_shape(t, t.data))
        for t in sharded_tensors(content)
        if is_main_replica(t.replica_id)
    ]
    if optimizer is not None:
        # Megatron's name for how the loader is to read the state.
        kind = CONTENT_METADATA["distrib_optim_sharding_type"]
        # Also gives torch's Adam the state that it lacks before its first step.
        parts = [
            part.state_dict() | {"param_state_sharding_type": kind} for part in optimizer.chained_optimizers
        ]
        # As Megatron's chain reads them: experts, of which other ranks have copies, have their own optimizer.
        common["optimizer"] = parts[0] if len(parts) == 1 else dict(enumerate(parts))
        for distributed in optimizer.chained_optimizers:
            pieces += _optimizer_pieces(distributed, content)
    return [piece for piece in pieces if piece.data.numel()], copy.deepcopy(common)


def bytes_to_save(models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> int:
    """About how much this rank writes into a checkpoint; known before the optimizer has any state."""
    content = model_content(models)
    weights = [t.data.nbytes for t in sharded_tensors(content) if is_main_replica(t.replica_id)]
    # As `_optimizer_pieces`: without what other ranks than those of its data parallelism have of a parameter.
    described = {whole.data: whole for chunk in content.values() for whole in chunk.values()}
    updated = [
        ranges["param"].size
        for distributed in optimizer.chained_optimizers
        for bucket in _buckets(distributed)
        for parameter, ranges in bucket["param_map"].items()
        if any(is_main_replica(whole.replica_id[:-1]) for whole in sharded_tensors(described[parameter]))
    ]
    return checkpoint_bytes(int(sum(weights)), int(sum(updated)))


def checkpoint_bytes(weights: int, updated: int) -> int:
    """About what a checkpoint takes of parameters of so many bytes, of which so many elements train."""
    return weights + len(_OPTIMIZER_STATE) * torch.float32.itemsize * updated


def optimizer_step(common: dict[str, Any]) -> float:
    """The optimizer's step in this rank's plain values; 0 where nothing trains."""
    groups = _groups(common)
    return max((group.get("step") or 0 for group in groups), default=0)


def set_optimizer_step(common: dict[str, Any], step: float) -> None:
    """Give every parameter group the step."""
    for group in _groups(common):
        group["step"] = step


def sharded_tensors(value: Any) -> Iterator[ShardedTensor]:
    """All tensors in a nested description, those of factories as they are stored."""
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        yield from sharded_tensors(value.build())
    elif isinstance(value, dict):
        for item in value.values():
            yield from sharded_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from sharded_tensors(item)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that hold the elements [start, stop) of a tensor in memory order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # inside of one row
        yield from _boxes_in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _boxes_in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _boxes_in_row(shape, last, 0, stop - last * row)


def _boxes_in_row(
    shape: Sequence[int], index: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes of elements [start, stop) of row `index`; none if that is nothing."""
    if start < stop:
        for offset, size in boxes(shape[1:], start, stop):
            yield (index, *offset), (1, *size)


def _optimizer_pieces(distributed: Any, content: dict[str, Any]) -> Iterable[TensorBox]:
    """This rank's run of elements of every parameter: main parameter and both moments."""
    described = {}
    for chunk in content.values():
        for tensor in chunk.values():
            described[tensor.data] = tensor  # keyed by the parameter itself
    for bucket in _buckets(distributed):
        for parameter, ranges in bucket["param_map"].items():
            start, stop = ranges["param"].start, ranges["param"].end
            state = distributed._get_main_param_and_optimizer_states(parameter)
            for whole in sharded_tensors(described[parameter]):
                # Every data parallel rank has a part of its own; other copies hold what the first one holds.
                if not is_main_replica(whole.replica_id[:-1]):
                    continue
                base = whole.data.storage_offset() - parameter.storage_offset()
                assert whole.data.is_contiguous(), f"{whole.key}: no run of its parameter's elements"
                end = base + whole.data.numel()
                for low, size in boxes(whole.local_shape, max(start, base) - base, min(stop, end) - base):
                    at = base - start + _flat_index(whole.local_shape, low)
                    for name in _OPTIMIZER_STATE:
                        part = state[name].detach().view(-1)[at : at + math.prod(size)].view(size)
                        yield _placed(whole, f"optimizer.state.{name}.{whole.key}", low, part)


def _buckets(distributed: Any) -> Iterator[dict[str, Any]]:
    for buffer in distributed.gbuf_ranges:
        for buckets in buffer.values():
            yield from buckets


def _flat_index(shape: Sequence[int], offset: Sequence[int]) -> int:
    index = 0
    for size, place in zip(shape, offset, strict=True):
        index = index * size + place
    return index


def _placed(whole: ShardedTensor, key: str, low: Sequence[int], part: Tensor) -> TensorBox:
    """A box `part` of the local tensor, as a box of the global one."""
    local = (*[0] * whole.prepend_axis_num, *low)
    offset = tuple(a + b for a, b in zip(whole.global_offset, local, strict=True))
    return TensorBox(key, tuple(whole.global_shape), offset, _with_box_shape(whole, part))


def _with_box_shape(whole: ShardedTensor, part: Tensor) -> Tensor:
    return part.detach().reshape((1,) * whole.prepend_axis_num + tuple(part.shape))


def optimizer_parts(state: dict[Any, Any]) -> list[dict[str, Any]]:
    """Of an optimizer's plain values or description: the one part, or Megatron's chain of them by number."""
    return list(state.values()) if 0 in state else [state]


def _groups(common: dict[str, Any]) -> list[dict[str, Any]]:
    parts = optimizer_parts(common["optimizer"]) if "optimizer" in common else []
    return [group for part in parts for group in part["optimizer"]["param_groups"]]

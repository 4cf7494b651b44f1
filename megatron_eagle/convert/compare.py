"""Two models, tensor by tensor: which names, shapes and bits differ. One tensor of each is in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_eagle.checkpoint import has_checkpoint, read_lora_config, read_model_config
from megatron_eagle.convert.checkpoint_files import CheckpointWeights
from megatron_eagle.convert.hf_metadata import HfMetadata
from megatron_eagle.convert.mapping import MappedTensor, ModelMapping
from megatron_eagle.convert.redundant import leave_out_redundant
from megatron_eagle.convert.shards import HfWeights
from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both models.

    `max_abs`: largest absolute difference in fp32, for tensors of one shape; None for others. 0 where values
    are equal and bits are not (0 and -0).
    """

    name: str
    what: str
    max_abs: float | None = None


class CheckpointTensors:
    """A checkpoint under the names of Hugging Face, as an export would write it, without its types.

    Attributes:
        shapes: tensor name -> shape.

    Raises:
        UserError: no checkpoint, one with LoRA adapters, or tensors that are not its configuration's.
    """

    def __init__(self, checkpoint: Path) -> None:
        if read_lora_config(checkpoint) is not None:
            raise UserError(f"{checkpoint}: it has LoRA adapters; export it (merged) and compare the export")
        config = read_model_config(checkpoint)
        self._passed_through = HfMetadata(checkpoint).tensors()
        plan = self._plan = ModelMapping(config, has_head=bool(self._passed_through))
        self._weights = CheckpointWeights(checkpoint)
        self._weights.check(plan)
        self.shapes = dict(plan.hf_shapes)
        self._places = {name: (e, i) for e in plan.entries for i, name in enumerate(e.hf)}
        self._held: tuple[MappedTensor | None, list[Tensor]] = (None, [])

    def read(self, name: str) -> Tensor:
        """One tensor, in the checkpoint's type."""
        if name in self._passed_through:
            return self._passed_through[name]
        entry, place = self._places[name]
        if self._held[0] is not entry:  # query, key and value lie in one tensor
            self._held = (entry, entry.layout.split(self._weights.read(entry.model), self._plan))
        return self._held[1][place]


def open_tensors(path: str | Path) -> HfWeights | CheckpointTensors:
    """The tensors of a Hugging Face folder or of a checkpoint.

    Raises:
        UserError: it is neither.
    """
    path = Path(path)
    if has_checkpoint(path):
        return CheckpointTensors(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a Hugging Face folder or a checkpoint")
    weights = HfWeights(path)
    leave_out_redundant(weights)
    return weights


def differences(
    one: HfWeights | CheckpointTensors, other: HfWeights | CheckpointTensors
) -> Iterator[Difference]:
    """Everything that is not the same: tensors of one side only, shapes, and values.

    Values are compared bit for bit in fp32, which holds fp16 and bf16 exactly: a type alone is no difference.
    """
    for name in sorted(one.shapes.keys() - other.shapes.keys()):
        yield Difference(name, "only in the first")
    for name in sorted(other.shapes.keys() - one.shapes.keys()):
        yield Difference(name, "only in the second")
    for name, shape in one.shapes.items():
        if name not in other.shapes:
            continue
        if tuple(shape) != tuple(other.shapes[name]):
            yield Difference(name, f"shape {list(shape)} and {list(other.shapes[name])}")
            continue
        difference = _compare(name, one.read(name), other.read(name))
        if difference is not None:
            yield difference


def _compare(name: str, a: Tensor, b: Tensor) -> Difference | None:
    worst, equal = 0.0, True
    rows = max(1, 4_000_000 // max(1, a[:1].numel())) if a.dim() else 1
    pairs = zip(a.split(rows), b.split(rows), strict=True) if a.dim() else [(a, b)]
    for part, counterpart in pairs:  # in fp32, so in parts
        x, y = part.float().contiguous(), counterpart.float().contiguous()
        if not torch.equal(x.view(torch.int32), y.view(torch.int32)):
            equal = False
            apart = float((x - y).abs().max())
            worst = apart if apart != apart else max(worst, apart)  # NaN stays
            if worst != worst:
                break
    return None if equal else Difference(name, "values", worst)

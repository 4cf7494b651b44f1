"""The weights of a model that is training, under the names of Hugging Face, while it stays where it is.

For whatever wants them without a checkpoint between: an engine that serves what trains, an evaluation beside
the run. Every rank gets every tensor, one after the other; memory holds one tensor of one layer more, as it
does in an export. The values are those that an export of a checkpoint of this moment would have, but for its
cast to the run's type, which a model in training has already.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.checkpoint.content import TensorBox, content_to_save, unwrapped
from megatron_eagle.convert.checkpoint_files import key_of, put_together
from megatron_eagle.convert.lora import merged
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.errors import UserError
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.training.optimizer import gather_parameters

Box = tuple[tuple[int, ...], tuple[int, ...], Callable[[], Tensor]]  # offset, size, and how to get its values


def stream_weights(
    models: Sequence[torch.nn.Module], names: Collection[str] | None = None, *, lora: LoraConfig | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors of a model in any layout, each whole on every rank, in the order of the layers.

    Collective over all ranks: every one asks for the same names and goes on to the end, or to the same
    tensor. Between two steps, for training changes the values in place; do not keep a tensor while it trains
    on (it may be the parameter itself), nor write into one.

    Args:
        models: this rank's chunks, with their wrappers or without.
        names: of `ModelMapping.hf_shapes`; None: all. A head of its own does not exist where it is tied.
        lora: the run's adapters, which are then merged, in fp32, into the weights that they adapt.

    Yields:
        Name and tensor, in the parameters' type and on their device.

    Raises:
        UserError: a name that the model has not, or adapters without `lora`.
    """
    (_, model), *_ = unwrapped(models)
    plan = ModelMapping(model.eagle, has_head=False)
    strange = sorted(set(names or ()) - plan.hf_shapes.keys())
    if strange:
        raise UserError(f"stream_weights: the model has no tensor {', '.join(strange[:4])} ({len(strange)})")
    gather_parameters([model for model in models if hasattr(model, "ddp_config")])
    weights = LiveWeights(models)
    if lora is None and weights.adapted:
        raise UserError("stream_weights: the model has adapters: say lora=, the run's, for them to be merged")
    tensors = plan.to_hf(weights.read, names)
    if lora is None:
        yield from tensors
        return
    for name, tensor in merged(tensors, weights, model.eagle, lora):
        yield name, tensor.to(weights.dtype)


class LiveWeights:
    """The parameters of a model, read whole by name from the ranks that have them. Collective, also to make.

    Attributes:
        dtype: of the parameters.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        pieces, _ = content_to_save(models, None, None)
        first = next(parameter for model in models for parameter in model.parameters())
        self.dtype, self._device = first.dtype, first.device
        own = [(piece.key, piece.shape, piece.offset, tuple(piece.data.shape)) for piece in pieces]
        everyones: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyones, own)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._boxes: dict[str, list[Box]] = {}
        for rank, theirs in enumerate(everyones):
            mine = iter(pieces) if rank == torch.distributed.get_rank() else None
            for key, shape, offset, size in theirs:
                read = partial(self._from_rank, rank, size, next(mine) if mine else None)
                self._shapes[key] = shape
                self._boxes.setdefault(key, []).append((offset, size, read))

    @property
    def adapted(self) -> bool:
        """Whether adapters are among them."""
        return any(".lora_" in key for key in self._boxes)

    def read(self, name: str) -> Tensor:
        """One parameter by the model's name for it."""
        key, _ = key_of(name)
        result = put_together(name, self._shapes[key], self._boxes[key])
        if result is None:
            raise AssertionError(f"no rank has all of {name}")
        return result

    def _from_rank(self, rank: int, size: tuple[int, ...], piece: TensorBox | None) -> Tensor:
        """A box of `rank`, which alone has its values, on every rank."""
        if piece is None:
            box = torch.empty(size, dtype=self.dtype, device=self._device)
        else:
            box = piece.data.detach().contiguous()
        torch.distributed.broadcast(box, rank)
        return box

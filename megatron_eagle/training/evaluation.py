"""The loss on held-out packs, with the weights and the normaliser of the training loss.

The result is that of one global batch with all evaluated packs: the sum of weighted token losses over the
sum of weights, whatever the layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_eagle.data.dataset import Batch, normalizer
from megatron_eagle.data.loader import DataConfig, PackLoader
from megatron_eagle.data.packing import read_packs
from megatron_eagle.data.store import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.parallel import Mesh


@dataclass
class EvaluationConfig:
    """`data` is a token store with packs of the training's `data.length`, made with the same tokenizer.

    Evaluated every `interval` iterations and after the last one: the first `batches` global batches, or all
    (null). A rest of less than a global batch is left out.
    """

    data: str
    interval: int
    batches: int | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class HeldOut:
    """The same packs in the same order at every evaluation. Raises `UserError` as `PackLoader`, and for too
    few packs."""

    def __init__(self, config: EvaluationConfig, data: DataConfig, batch_size: int, mesh: Mesh) -> None:
        data = replace(data, path=config.data, prefetch=False)
        self._loader = PackLoader(
            data,
            global_batch_size=batch_size,
            data_parallel_rank=mesh.dp.rank,
            data_parallel_size=mesh.dp.size,
            decode_media=mesh.pp.rank == 0,
        )
        available = self._loader.packs_per_epoch // batch_size
        if available < (config.batches or 1):
            self._loader.close()
            raise UserError(
                f"evaluation.data: {config.data} has {self._loader.packs_per_epoch} packs of length "
                f"{data.length}, and {config.batches or 1} global batches of {batch_size} are asked for"
            )
        self._starts = [i * batch_size for i in range(config.batches or available)]
        index = read_packs(SampleStore(config.data, data.length))
        sums = [
            normalizer(
                index, self._loader.packs(start), weighting=data.loss_weighting, multi_turn=data.multi_turn
            )
            for start in self._starts
        ]
        self._shares = [value / sum(sums) for value in sums]

    def __iter__(self) -> Iterator[tuple[list[Batch], float]]:
        """This rank's microbatches of each global batch, and the batch's share in the result."""
        for start, share in zip(self._starts, self._shares, strict=True):
            yield self._loader.step(start), share

    def close(self) -> None:
        """Stop the background work."""
        self._loader.close()


def evaluate(
    held_out: HeldOut, mesh: Mesh, device: torch.device, forward: Callable[[list[Batch]], float]
) -> float:
    """Loss on all of `held_out`. Collective.

    `forward` gives this rank's part of a batch's loss, on the last pipeline stage once per tensor parallel
    rank.
    """
    loss = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for batches, share in held_out:
            part = forward(batches)
            if mesh.is_last_stage() and mesh.tp.rank == 0:
                loss += share * part
    loss = loss.to(device)
    torch.distributed.all_reduce(loss)
    return loss.item()

"""The loss on held-out packs, with the weights and the normaliser of the training loss.

The result is that of one global batch with all evaluated packs: the sum of weighted token losses over the
sum of weights, whatever the layout.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_eagle.data.dataset import Batch
from megatron_eagle.data.loader import DataConfig, GlobalBatch, PackLoader
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
    few packs.

    `open_loader` opens the run's kind of loader for other data.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        batch_size: int,
        open_loader: Callable[[DataConfig], PackLoader],
    ) -> None:
        self._loader = open_loader(replace(data, path=config.data, prefetch=False))
        available = self._loader.packs_per_epoch // batch_size
        if available < (config.batches or 1):
            self._loader.close()
            raise UserError(
                f"evaluation.data: {config.data} has {self._loader.packs_per_epoch} packs of length "
                f"{data.length}, and {config.batches or 1} global batches of {batch_size} are asked for"
            )
        self._starts = [i * batch_size for i in range(config.batches or available)]

    def batches(self, read: Callable[[PackLoader, int], GlobalBatch]) -> Iterator[GlobalBatch]:
        """The global batches; `read` takes one from a loader."""
        for start in self._starts:
            yield read(self._loader, start)

    def close(self) -> None:
        """Stop the background work."""
        self._loader.close()


def evaluate(
    batches: Iterable[GlobalBatch], mesh: Mesh, device: torch.device, forward: Callable[[list[Batch]], float]
) -> float | None:
    """Loss on all global batches together; None if no token of them has weight. Collective.

    `forward` gives this rank's part of a batch's loss, on the last pipeline stage once per tensor parallel
    rank.
    """
    loss, total = torch.zeros(1, dtype=torch.float64), 0.0
    with torch.no_grad():
        for batch in batches:
            part = forward(batch.microbatches)
            total += batch.total
            if mesh.is_last_stage() and mesh.tp.rank == 0:
                loss += batch.total * part
    loss = loss.to(device)
    torch.distributed.all_reduce(loss)
    return loss.item() / total if total else None

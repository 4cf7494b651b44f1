"""The loss on held-out packs, with the weights and the normaliser of the training loss.

The result is that of one global batch with all evaluated packs: the sum of weighted token losses over the
sum of weights, whatever the layout; so are its parts by data set.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from megatron_eagle.data.loading.loader import DataConfig
from megatron_eagle.data.loading.packs import BatchLoader
from megatron_eagle.errors import UserError
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.device import send_to
from megatron_eagle.runtime.parallel import Mesh
from megatron_eagle.training.monitoring.dataset_losses import DatasetLosses, count_datasets, read_datasets
from megatron_eagle.training.monitoring.metrics import EvaluationMetrics
from megatron_eagle.training.monitoring.observer import Observer, Step
from megatron_eagle.training.resilience.failed_media import MediaPolicy
from megatron_eagle.training.schedule import TrainingBatch, TrainingPack


@dataclass
class EvaluationConfig(Ranged):
    """`data` is a token store with packs of the training's `data.length`, made with the same tokenizer.

    Evaluated every `interval` iterations and after the last one: the first `batches` global batches, or all
    (null). A rest of less than a global batch is left out.
    """

    data: str
    interval: Annotated[int, Range(1, 10**9)]
    batches: Annotated[int, Range(1, 10**9)] | None = None


def count_batches(config: EvaluationConfig, packs: int, batch_size: int) -> int:
    """Global batches of an evaluation on a store of so many packs.

    Raises:
        UserError: there are too few packs.
    """
    wanted, available = config.batches or 1, packs // batch_size
    if available < wanted:
        raise UserError(
            f"evaluation.data: {config.data} has {packs} packs of this data.length, and {wanted} global "
            f"batches of {batch_size} are asked for"
        )
    return config.batches or available


class HeldOut:
    """The same packs in the same order at every evaluation.

    `open_loader` opens the run's kind of loader for other data.

    Raises:
        UserError: as `PackLoader`, and for too few packs.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        batch_size: int,
        open_loader: Callable[[DataConfig], BatchLoader[InputPlan]],
    ) -> None:
        self._loader = open_loader(replace(data, path=config.data, prefetch=False, follow=None))
        try:
            batches = count_batches(config, self._loader.packs_per_epoch, batch_size)
        except UserError:
            self._loader.close()
            raise
        self._starts = range(0, batches * batch_size, batch_size)

    @property
    def datasets(self) -> list[str]:
        """Names of the held-out mixture's data sets."""
        return self._loader.datasets

    def batches(
        self, read: Callable[[BatchLoader[InputPlan], int], TrainingBatch]
    ) -> Iterator[TrainingBatch]:
        """The global batches; `read` takes one from a loader."""
        for start in self._starts:
            yield read(self._loader, start)

    def close(self) -> None:
        """Stop the background work."""
        self._loader.close()


@dataclass
class Evaluation(Observer):
    """Evaluates every `interval` iterations and after the last one; `forward` as for `evaluate`."""

    held_out: HeldOut
    interval: int
    media: MediaPolicy
    mesh: Mesh
    device: torch.device
    forward: Callable[[Sequence[TrainingPack]], Tensor]

    def between_steps(self, step: Step, tell: Observer) -> None:
        if not step.is_last and step.iteration % self.interval:
            return
        tell.phase(step.iteration, "evaluation")
        read = partial(self.media.read, tell=tell, iteration=step.iteration, of="evaluation")
        loss, datasets = evaluate(
            self.held_out.batches(read), self.held_out.datasets, self.mesh, self.device, self.forward
        )
        tell.evaluation(
            EvaluationMetrics(step.iteration, loss, datasets.loss, datasets.share, datasets.tokens)
        )


def evaluate(
    batches: Iterable[TrainingBatch],
    datasets: Sequence[str],
    mesh: Mesh,
    device: torch.device,
    forward: Callable[[Sequence[TrainingPack]], Tensor],
) -> tuple[float | None, DatasetLosses]:
    """Loss on all global batches together (None if no token of them has weight), and by data set. Collective.

    `forward` gives this rank's part of a batch's loss and of the losses by data set, as `run_schedule`.
    """
    losses = torch.zeros(1 + len(datasets), dtype=torch.float64, device=device)
    counts, total = torch.zeros(2, len(datasets), dtype=torch.float64), 0.0
    with torch.no_grad():
        for batch in batches:
            losses += batch.total * forward(batch.microbatches)
            total += batch.total
            if mesh.speaks_for_replica:
                weights, tokens = count_datasets(batch.microbatches, len(datasets))
                counts += torch.stack([batch.total * weights, tokens])
    sums = torch.cat([losses, send_to(device, counts.flatten())])
    torch.distributed.all_reduce(sums)
    loss, *by_dataset = sums.tolist()
    return loss / total if total else None, read_datasets(datasets, by_dataset, total)

"""Gradients of one global batch, with all that the ranks tell each other of it in one all-reduce."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_eagle.model.experts import take_balance
from megatron_eagle.runtime.device import send_to
from megatron_eagle.training.monitoring.dataset_losses import DatasetLosses, count_datasets, read_datasets
from megatron_eagle.training.monitoring.step_totals import StepTotals, count_totals, read_totals, zero_totals
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.schedule import TrainingPack, build_batch, run_schedule
from megatron_eagle.training.setup import Run


@dataclass(frozen=True)
class BatchResult:
    """What a global batch was. Equal on every rank."""

    loss: float
    aux_loss: float | None  # of its routers, before the coefficient; None: none of them learns from any
    totals: StepTotals
    datasets: DatasetLosses
    told_to_stop: bool  # whether any rank was


def _exchanges_keys(config: RunConfig) -> bool:
    """Whether ranks do, in a way that is chosen here and not in Transformer Engine."""
    layout = config.layout
    several = layout.context_parallel_size > layout.ulysses_parallel_size
    return several and config.layers.attention != "te"


def forward_backward(run: Run, packs: Sequence[TrainingPack], stop: Collection[str]) -> BatchResult:
    """Leave the gradients of one global batch with the optimizer. Collective.

    Args:
        packs: this rank's share of the batch.
        stop: not empty where this rank is told to stop.
    """
    names, length = run.loader.datasets, run.config.data.length
    for model in run.models:
        model.zero_grad_buffer()
    run.optimizer.zero_grad()
    n = len(names)
    losses = run_packs(run, packs, n)
    balance = take_balance(run.models, losses.device)
    counts, totals = torch.zeros(2, n, dtype=torch.float64), zero_totals(length)
    if run.mesh.speaks_for_replica:  # a pack is counted once
        counts = count_datasets(packs, n)
        totals = count_totals(
            packs,
            run.config.model,
            length,
            trainable=run.config.optimizer.trainable,
            adapters=run.config.lora is not None,
            keys=[pack.plan.keys for pack in packs] if _exchanges_keys(run.config) else (),
        )
    stops = torch.tensor([len(stop)], dtype=torch.float64)
    of_host = send_to(losses.device, torch.cat([counts.flatten(), stops, totals]))
    sums = torch.cat([losses, of_host, balance])
    torch.distributed.all_reduce(sums)
    loss, by_dataset, stops, totals, balance = sums.cpu().split([1, 3 * n, 1, len(totals), 1])
    return BatchResult(
        loss.item(),
        balance.item() or None,
        read_totals(totals, length),
        read_datasets(names, by_dataset.tolist()),
        told_to_stop=stops.item() > 0,
    )


def run_packs(
    run: Run, packs: Sequence[TrainingPack], datasets: int, *, forward_only: bool = False
) -> Tensor:
    """This rank's part of the loss of its packs, and of the losses by data set, as `run_schedule`."""
    return run_schedule(
        run.models,
        run.mesh,
        packs,
        partial(build_batch, run.device.torch_device),
        length=run.config.data.sequence_length,
        groups=datasets,
        forward_only=forward_only,
    )

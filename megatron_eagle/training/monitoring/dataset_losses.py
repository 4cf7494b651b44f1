"""Loss by data set of the mixture: what ranks add up of it, and what a step or an evaluation reports.

The loss of a data set is sum(w x loss) / sum(w) over its samples that are kept, its share sum(w) / total with
the normaliser of the whole batch: share x loss adds up to the loss of the batch. The sums of w x loss are
formed on the device (`loss.group_losses`); what else there is follows on the host from a rank's packs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.loading.packs import TokenPack


@dataclass(frozen=True)
class DatasetLosses:
    """By name of the data set; None where no sample of it is kept."""

    loss: dict[str, float | None]
    share: dict[str, float | None]  # of the loss's weight
    tokens: dict[str, int | None]  # of the kept samples


def count_datasets(batches: Sequence[TokenPack], datasets: int) -> Tensor:
    """Weights, and tokens of the kept samples, by data set in whole packs: fp64 [2, datasets]."""
    sums = np.zeros((2, datasets))
    for batch in batches:
        weights, groups = batch.loss_weights.double().numpy(), batch.group_ids.numpy()
        sums[0] += np.bincount(groups, weights, datasets)
        for sample in batch.samples:
            if weights[sample.start : sample.end].sum() > 0:  # a sample that is left out has no weight
                sums[1, groups[sample.start]] += sample.end - sample.start
    return torch.from_numpy(sums)


def read_datasets(names: Sequence[str], sums: Sequence[float], total: float = 1.0) -> DatasetLosses:
    """What sums over all ranks say: those of `loss.group_losses`, then those of `count_datasets`.

    `total` is the normaliser that their weights have yet to be divided by.
    """
    n = len(names)
    losses, weights, tokens = sums[:n], sums[n : 2 * n], sums[2 * n :]
    kept = [number for number, weight in enumerate(weights) if weight > 0]
    nothing = dict.fromkeys(names)
    return DatasetLosses(
        loss=nothing | {names[i]: losses[i] / weights[i] for i in kept},
        share=nothing | {names[i]: weights[i] / total for i in kept},
        tokens=nothing | {names[i]: int(tokens[i]) for i in kept},
    )

"""The training loss: a plain sum of weighted token losses, in Megatron's `forward_step` form.

The weights arrive divided by the normaliser of the whole global batch (`data.loading`), so nothing is
averaged afterwards: the sums of all microbatches and all data and context parallel ranks add up to the
loss of the batch, and so do their gradients, however the samples were packed or spread.
"""

import torch
from torch import Tensor

from megatron_eagle.model.language import Targets

# Megatron asks for a token count. It would divide by it (as an int32) in `finalize_model_grads`, which
# `optimizer.wrap_models` prevents; the value is never read.
_NO_TOKEN_COUNT = 0


def weighted_loss(token_losses: Tensor, loss_weights: Tensor) -> Tensor:
    """This rank's part of the loss of the global batch, a scalar.

    token_losses [1, s] and loss_weights [s], fp32, for the s tokens that this context parallel rank holds.
    """
    return torch.dot(token_losses.view(-1).float(), loss_weights)


def group_losses(token_losses: Tensor, loss_weights: Tensor, group_ids: Tensor, groups: int) -> Tensor:
    """This rank's part of the loss, by group: fp64 [groups], without gradients.

    Shapes as in `weighted_loss`; group_ids [s] int64 below `groups`.
    """
    weighted = token_losses.detach().view(-1).double() * loss_weights
    return weighted.new_zeros(groups).index_add_(0, group_ids, weighted)


def megatron_loss(
    token_losses: Tensor, targets: Targets, groups: int = 0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(loss, token count, values to report): what a schedule takes under `calculate_per_token_loss`.

    To be reported are the loss and, in fp64, its parts by group; 0 groups: nothing by group.
    """
    loss = weighted_loss(token_losses, targets.loss_weights)
    by_group = loss.new_zeros(0, dtype=torch.float64)
    if groups:
        by_group = group_losses(token_losses, targets.loss_weights, targets.group_ids, groups)
    no_count = loss.new_full((), _NO_TOKEN_COUNT, dtype=torch.int)  # no copy from the host to wait for
    return loss, no_count, (loss.detach(), by_group)

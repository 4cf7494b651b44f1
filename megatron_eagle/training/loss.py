"""The training loss: a plain sum of weighted token losses, in Megatron's `forward_step` form.

The weights arrive divided by the normaliser of the whole global batch (`data.loader`), so nothing is
averaged afterwards: the sums of all microbatches and all data and context parallel ranks add up to the
loss of the batch, and so do their gradients, however the samples were packed or spread.
"""

import torch
from torch import Tensor

# Megatron asks for a token count. It would divide by it (as an int32) in `finalize_model_grads`, which
# `optimizer.wrap_models` prevents; the value is never read.
_NO_TOKEN_COUNT = 0


def weighted_loss(token_losses: Tensor, loss_weights: Tensor) -> Tensor:
    """This rank's part of the loss of the global batch, a scalar.

    token_losses [1, s] and loss_weights [s], fp32, for the s tokens that this context parallel rank holds.
    """
    return torch.dot(token_losses.view(-1).float(), loss_weights)


def megatron_loss(token_losses: Tensor, loss_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, token count, value to report): what a schedule takes under `calculate_per_token_loss`."""
    loss = weighted_loss(token_losses, loss_weights)
    return loss, torch.tensor(_NO_TOKEN_COUNT, dtype=torch.int, device=loss.device), loss.detach()

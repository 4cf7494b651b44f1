"""RMSNorm in the rounding order of Qwen2: normalise in fp32, round to the input's type, then scale.

y = weight * (x / sqrt(mean(x^2) + eps)).to(x.dtype). Scaling before rounding differs in bf16 by up
to one unit in the last place per layer, which a converted checkpoint would show.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., h], weight [h] -> [..., h] in x's type; plain torch, differentiable by autograd."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)

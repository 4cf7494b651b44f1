"""The vision encoder's core attention: every patch of a tile sees every other (Megatron's own is causal).

On a GPU with deterministic algorithms torch's own choice of a kernel does not keep what was asked for: as
long as only warnings are asked for (`runtime/determinism.py`), fused kernels sum the gradient of the queries
in any order. Two do keep it: its flash attention in the strict mode, and the plain products of matrices.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_eagle.runtime.determinism import strictly_deterministic


class BidirectionalAttention(MegatronModule):
    """Megatron's `core_attention` plug-in."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = config.kv_channels**-0.5  # transformers' form; torch's own default is 1 / sqrt(d)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """[patches, tiles, heads, d] each -> [patches, tiles, heads * d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend(q, k, v, self.scale).permute(2, 0, 1, 3).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[tiles, heads, patches, d] each -> the same shape."""
    kernel = choose_kernel(q)
    if kernel == "flash":
        out: Tensor = DeterministicFlash.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
        return out
    with sdpa_kernel(SDPBackend.MATH) if kernel == "math" else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def choose_kernel(q: Tensor) -> Literal["any", "flash", "math"]:
    """What sums gradients of such queries as determinism wants it; any: torch's choice does."""
    if not (q.is_cuda and torch.are_deterministic_algorithms_enabled()):  # a CPU's kernels sum in one order
        return "any"
    taken = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    here = torch.backends.cuda.is_flash_attention_available()
    return "flash" if taken and here and torch.cuda.get_device_capability(q.device) >= (8, 0) else "math"


class DeterministicFlash(torch.autograd.Function):
    """torch's flash attention; its gradients are sums in one order. Written, not yet run on a GPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse, *lengths, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.lengths, ctx.scale = lengths, scale
        result: Tensor = out
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, *state = ctx.saved_tensors
        with strictly_deterministic():
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad_out, q, k, v, out, lse, *ctx.lengths, 0.0, False, *state, scale=ctx.scale
            )
        grad_q, grad_k, grad_v = grads
        return grad_q, grad_k, grad_v, None

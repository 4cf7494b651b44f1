"""torch's own flash attention 2 kernels (under `varlen_attn`) as an attention backend: nothing to install.

The aten operators are called instead of `varlen_attn` because backward must be callable without autograd.
Causal is bottom-right in them, as in flash-attn since 2.1.
"""

import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.varlen import fill_unseen, varlen_shape
from megatron_eagle.runtime.determinism import strictly_deterministic

_COMMON = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
_FORWARD = [*_COMMON, "return_debug_mask", "scale"]
_BACKWARD = ["grad_out", *_COMMON[:3], "out", "logsumexp", *_COMMON[3:], "rng_state", "unused", "scale"]


class TorchVarlenAttention:
    """`AttentionBackend` by torch's flash attention, bf16 or fp16, sm_80 and up. Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        for name, needed in (("forward", _FORWARD), ("backward", _BACKWARD)):
            schema = getattr(torch.ops.aten, f"_flash_attention_{name}").default._schema
            known = [argument.name for argument in schema.arguments]
            if [argument for argument in known if argument in needed] != needed:
                return f"torch {torch.__version__} has another _flash_attention_{name}({', '.join(known)})"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it needs compute capability 8.0"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *varlen_shape(segments, q.device), 0.0, causal, False, scale=scale
        )
        fill_unseen(segments, out, lse)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: tuple[Segment, ...],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = varlen_shape(segments, q.device)
        # Without dropout the random state is not read.
        state, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
        with strictly_deterministic():
            grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
                grad_out.contiguous(),
                q,
                k,
                v,
                out,
                lse.contiguous(),
                *shape,
                0.0,  # of dropout
                causal,
                state,
                unused,
                scale=scale,
            )
        fill_unseen(segments, grad_q)
        return grad_q, grad_k, grad_v

"""FlashAttention 4 (`flash-attn-4` on PyPI, the module `flash_attn.cute`) as an attention backend.

It is for Blackwell. Its kernels are written in CUTLASS's Python and compiled when they are first used. As
with the older ones, functions under its autograd layer are called, whose argument names are checked before.
"""

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.varlen import empty_contiguous, fill_unseen, varlen_shape
from megatron_eagle.runtime.libraries import why_not_library

_MODULE = "flash_attn.cute.interface"
_LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
_COMMON = {"q", "k", "v", *_LENGTHS, "softmax_scale", "causal"}
_NEEDED = {
    "_flash_attn_fwd": _COMMON | {"num_splits", "return_lse"},
    "_flash_attn_bwd": _COMMON | {"out", "dout", "lse", "deterministic", "dq", "dk", "dv"},
}


class FlashAttention4:
    """`AttentionBackend` by flash-attn-4 4.0.0b36 or what is called alike. Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        if missing := why_not_library(_MODULE):
            return missing
        if torch.cuda.get_device_capability()[0] != 10:
            return "FlashAttention 4 is for compute capability 10.x (Blackwell)"
        for name, needed in _NEEDED.items():
            function = getattr(_interface(), name, None)
            if function is None:
                return f"this flash_attn.cute has no {name}"
            if unknown := needed - set(inspect.signature(function).parameters):
                return f"this flash_attn.cute's {name} takes no {', '.join(sorted(unknown))}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        lengths = dict(zip(_LENGTHS, varlen_shape(segments, q.device), strict=True))
        # Keys not split, which sums in one order.
        out, lse, *_ = _interface()._flash_attn_fwd(
            q=q, k=k, v=v, **lengths, softmax_scale=scale, causal=causal, num_splits=1, return_lse=True
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
        grad_q, grad_k, grad_v = empty_contiguous(q, k, v)
        _interface()._flash_attn_bwd(
            q=q,
            k=k,
            v=v,
            out=out,
            dout=grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(),
            lse=lse.contiguous(),
            **dict(zip(_LENGTHS, varlen_shape(segments, q.device), strict=True)),
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=grad_q,
            dk=grad_k,
            dv=grad_v,
        )
        fill_unseen(segments, grad_q)
        return grad_q, grad_k, grad_v


def _interface() -> Any:
    return importlib.import_module(_MODULE)

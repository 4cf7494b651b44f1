"""flash-attn as attention backends: FlashAttention 2 (sm_80 and up), and FlashAttention 3 (Hopper only).

Both are varlen kernels for bf16 and fp16, bottom-right where causal, and deterministic in backward if asked.
What is called are the functions under their autograd layers, because backward must be callable without
autograd. These are not public: their argument names are checked before use.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.varlen import empty_contiguous, fill_unseen, varlen_shape
from megatron_eagle.runtime.libraries import why_not_library

# What FlashAttention 2 is given by name.
_LENGTHS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
_SETTINGS = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
_FORWARD = {"q", "k", "v", *_LENGTHS, "softmax_scale", "causal", "return_softmax", *_SETTINGS}
_GRADIENTS = ["dq", "dk", "dv"]
_BACKWARD = {"dout", "q", "k", "v", "out", "softmax_lse", *_GRADIENTS, *_LENGTHS, "softmax_scale"}
_BACKWARD |= {"causal", "deterministic", *_SETTINGS}

# Where FlashAttention 3's operators take what they are given: they are called by place, as torch itself does
# (torch/nn/attention/_fa3.py).
_PLACES = {
    "fwd": {7: "cu_seqlens_q", 8: "cu_seqlens_k", 12: "max_seqlen_q", 13: "max_seqlen_k"}
    | {23: "softmax_scale", 24: "is_causal", 31: "num_splits"},
    "bwd": {9: "cu_seqlens_q", 10: "cu_seqlens_k", 13: "max_seqlen_q", 14: "max_seqlen_k"}
    | {15: "softmax_scale", 16: "is_causal", 20: "deterministic"},
}


class FlashAttention:
    """`AttentionBackend` by flash-attn 2.7 or later. Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        if missing := why_not_library("flash_attn.flash_attn_interface"):
            return missing
        for name, needed in (("forward", _FORWARD), ("backward", _BACKWARD)):
            function = getattr(_flash_attn(), f"_flash_attn_varlen_{name}", None)
            if function is None:
                return f"this flash_attn has no varlen {name} of its own: 2.7 or later has"
            if unknown := needed - _parameters(function):
                return f"this flash_attn's varlen {name} takes no {', '.join(sorted(unknown))}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        lengths = dict(zip(_LENGTHS, varlen_shape(segments, q.device), strict=True))
        out, lse, *_ = _flash_attn()._flash_attn_varlen_forward(
            q=q, k=k, v=v, **lengths, softmax_scale=scale, causal=causal, return_softmax=False, **_SETTINGS
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
        grads = empty_contiguous(q, k, v)
        _flash_attn()._flash_attn_varlen_backward(
            dout=grad_out,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse.contiguous(),
            **dict(zip(_GRADIENTS, grads, strict=True)),
            **dict(zip(_LENGTHS, varlen_shape(segments, q.device), strict=True)),
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_SETTINGS,
        )
        fill_unseen(segments, grads[0])
        return grads


class FlashAttention3:
    """`AttentionBackend` by FlashAttention 3 (the module `flash_attn_interface`). Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        if missing := why_not_library("flash_attn_interface"):
            return missing
        if torch.cuda.get_device_capability()[0] != 9:
            return "FlashAttention 3 needs compute capability 9.x"
        for name, places in _PLACES.items():
            operator = getattr(torch.ops.flash_attn_3, name, None)
            if operator is None:
                return f"this flash_attn_interface registers no operator flash_attn_3::{name}"
            known = dict(enumerate(argument.name for argument in operator.default._schema.arguments))
            if other := [
                f"{known.get(at)} for {wanted}" for at, wanted in places.items() if known.get(at) != wanted
            ]:
                return f"this flash_attn_3::{name} has {', '.join(other)}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        cu_q, cu_k, max_q, max_k = varlen_shape(segments, q.device)
        arguments: list[Any] = [q, k, v]
        arguments += [None] * 4  # new keys and values, second queries, output
        arguments += [cu_q, cu_k, None, None, None]  # cumulative lengths, those of new keys, lengths in use
        arguments += [max_q, max_k]
        arguments += [None] * 9  # pages, rotation, scales of 8-bit inputs
        arguments += [scale, causal]
        arguments += [-1, -1, 0, 0.0]  # no window, no chunks, no cap
        arguments += [False, None]  # rotation, schedule
        # Keys not split, which sums in one order; its own choice of packing; all processors.
        arguments += [1, None, 0]
        out, lse, *_ = torch.ops.flash_attn_3.fwd(*arguments)
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
        cu_q, cu_k, max_q, max_k = varlen_shape(segments, q.device)
        grads = empty_contiguous(q, k, v)
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        arguments: list[Any] = [grad_out, q, k, v, out, lse.contiguous(), *grads]
        arguments += [cu_q, cu_k, None, None]  # cumulative lengths, lengths in use
        arguments += [max_q, max_k, scale, causal]
        arguments += [-1, -1, 0.0]  # no window, no cap
        arguments += [torch.are_deterministic_algorithms_enabled(), 0]  # all processors
        torch.ops.flash_attn_3.bwd(*arguments)
        fill_unseen(segments, grads[0])
        return grads


def _flash_attn() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Argument names; flash-attn registers its functions as operators under some versions of torch only."""
    return set(inspect.signature(getattr(function, "_init_fn", function)).parameters)

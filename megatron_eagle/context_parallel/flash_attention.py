"""flash-attn 2.7 or later as an attention backend: bottom-right causal varlen, bf16 or fp16, sm_80 and up."""

import torch

from megatron_eagle.context_parallel.varlen import varlen_shape

# What is passed by name: checked against the installed version's own schema.
_FORWARD = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale"}
_BACKWARD = _FORWARD | {"dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"}
_UNUSED = {
    "dropout_p": 0.0,
    "causal": True,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


class FlashAttention:
    """`AttentionBackend` by flash-attn's varlen kernels. Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        try:
            import flash_attn.flash_attn_interface  # noqa: F401
        except (ImportError, OSError) as error:
            return f"flash_attn does not import: {error}"
        for name, needed in (("forward", _FORWARD), ("backward", _BACKWARD)):
            operator = getattr(torch.ops.flashattn, f"_flash_attn_varlen_{name}", None)
            if operator is None:
                return f"this flash_attn has no varlen {name} operator: 2.7 or later has"
            missing = (needed | _UNUSED.keys()) - {a.name for a in operator.default._schema.arguments}
            if missing:
                return f"this flash_attn's varlen {name} takes no {', '.join(sorted(missing))}"
        return None

    def forward(self, q, k, v, segments, scale):
        shape = varlen_shape(segments, q.device)
        out, lse, *_ = torch.ops.flashattn._flash_attn_varlen_forward(
            q, k, v, *shape[:2], *shape[2:], softmax_scale=scale, return_softmax=False, **_UNUSED
        )
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, segments, scale):
        shape = varlen_shape(segments, q.device)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        torch.ops.flashattn._flash_attn_varlen_backward(
            *(grad_out, q, k, v, out, lse.contiguous()),
            *grads,
            *shape,
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_UNUSED,
        )
        return tuple(grads)

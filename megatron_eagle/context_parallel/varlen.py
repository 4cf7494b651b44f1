"""What varlen attention kernels are called with: segments as lengths, and room for gradients."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.runtime.device import send_to


class VarlenShape(NamedTuple):
    """Cumulative lengths int32 [n + 1] of queries and keys on the device, and the longest of each."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@lru_cache(maxsize=32)
def varlen_shape(segments: tuple[Segment, ...], device: torch.device) -> VarlenShape:
    """`segments` follow each other without gaps in queries and in keys.

    Remembered, because every layer and head group of a microbatch asks for the same.
    """
    cu_q, cu_k = ([0, *(part[end] for part in segments)] for end in (1, 3))
    return VarlenShape(
        send_to(device, torch.tensor(cu_q, dtype=torch.int32)),
        send_to(device, torch.tensor(cu_k, dtype=torch.int32)),
        max(part.q_end - part.q_start for part in segments),
        max(part.k_end - part.k_start for part in segments),
    )


def empty_contiguous(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for one gradient each; they may be slices of heads, whose strides `empty_like` would keep."""
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def fill_unseen(segments: tuple[Segment, ...], out: Tensor, lse: Tensor | None = None) -> None:
    """Write what queries have that see no key: out (or a gradient) [s, ...] 0, lse [np, s] minus infinity.

    flash-attn calls such a log-sum-exp plus infinity; what other kernels leave there is not documented.
    """
    for part in segments:
        if part.k_start == part.k_end:
            out[part.q_start : part.q_end] = 0
            if lse is not None:
                lse[:, part.q_start : part.q_end] = -torch.inf

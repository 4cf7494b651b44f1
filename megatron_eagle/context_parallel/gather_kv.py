"""Attention with all-gathered keys and values: one collective forward, one each way backward.

Every context parallel rank keeps its queries, gathers all keys and values, and runs one causal
attention per document segment. Backward gathers them again instead of keeping them, and returns
their gradients, summed in fp32, to the ranks that hold the tokens.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eagle.context_parallel.layout import SequenceLayout


def gather_sequence(x: Tensor, layout: SequenceLayout, group: dist.ProcessGroup) -> Tensor:
    """[s, ...] of each rank -> [S, ...] in natural order, the same on every rank."""
    if layout.size == 1:
        return x
    gathered = x.new_empty((layout.length, *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered[layout.natural_order.to(x.device)]


def reduce_scatter_sequence(x: Tensor, layout: SequenceLayout, group: dist.ProcessGroup) -> Tensor:
    """[S, ...] in natural order -> [s, ...]: the sum over ranks of this rank's tokens."""
    if layout.size == 1:
        return x
    local = x.new_empty((layout.length // layout.size, *x.shape[1:]))
    dist.reduce_scatter_tensor(local, x[layout.rank_major_order.to(x.device)], group=group)
    return local


class GatherKVAttention(torch.autograd.Function):
    """q [s, np, d], k and v [s, ng, d] of this rank -> out [s, np, d]."""

    @staticmethod
    def forward(ctx, q, k, v, backend, layout, segments, scale, group):
        keys, values = gather_sequence(torch.stack([k, v], dim=1), layout, group).unbind(1)
        out, lse = backend.forward(q, keys, values, segments, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.layout, ctx.segments, ctx.scale, ctx.group = backend, layout, segments, scale, group
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        keys, values = gather_sequence(torch.stack([k, v], dim=1), ctx.layout, ctx.group).unbind(1)
        grad_q, grad_keys, grad_values = ctx.backend.backward(
            grad_out, q, keys, values, out, lse, ctx.segments, ctx.scale
        )
        grad_kv = reduce_scatter_sequence(
            torch.stack([grad_keys, grad_values], dim=1), ctx.layout, ctx.group
        ).to(k.dtype)
        return grad_q, *grad_kv.unbind(1), None, None, None, None, None

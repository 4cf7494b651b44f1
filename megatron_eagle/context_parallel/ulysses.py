"""Ulysses: ranks trade tokens for heads around attention, by one all-to-all each way.

Before attention each of the U ranks of a group holds all heads of its s tokens; in attention it holds 1/U
of the heads of all U x s tokens, rank after rank (`SequenceLayout.cut_each` cuts them so). Query heads go
with their KV head, so U divides the KV heads of a tensor parallel rank: replicating a
KV head would move and store it U times over and add up its gradients once more, which all-gathered
keys do not need. Beyond the heads, Ulysses is combined with all-gathered keys (`gather_kv.py`) over the
ranks that have the same heads. Source: DeepSpeed-Ulysses (arXiv 2309.14509), USP (arXiv 2405.07719).

Each rank sends (U - 1) / U of its q, k, v and outputs; all-gathering keys moves U - 1 times its k and v.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[U, ...]: part i goes to rank i -> [U, ...]: part i came from rank i."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def _spread_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, U, h, d] all heads of own tokens, in U blocks -> [U * s, h, d] own block of all tokens."""
    return _exchange(x.transpose(0, 1).contiguous(), group).flatten(0, 1)


def _collect_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[U * s, h, d] own block of all tokens -> [s, U, h, d] all heads of own tokens, in U blocks."""
    return _exchange(x.contiguous().unflatten(0, (group.size(), -1)), group).transpose(0, 1)


class TokensToHeads(torch.autograd.Function):
    """q [s, np, d], k and v [s, ng, d] -> q [U * s, np / U, d], k and v [U * s, ng / U, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group = group
        blocks = [x.unflatten(1, (group.size(), -1)) for x in (q, k, v)]
        ctx.sizes = [block.shape[2] for block in blocks]
        q, k, v = _spread_heads(torch.cat(blocks, dim=2), group).split(ctx.sizes, dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        collected = _collect_heads(torch.cat(grads, dim=1), ctx.group)
        return *(grad.flatten(1, 2) for grad in collected.split(ctx.sizes, dim=2)), None


class HeadsToTokens(torch.autograd.Function):
    """Outputs [U * s, np / U, d] -> [s, np, d]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _collect_heads(out, group).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _spread_heads(grad.unflatten(1, (ctx.group.size(), -1)), ctx.group), None

"""Ulysses: ranks trade tokens for heads around attention, by one all-to-all each way.

Before attention each of the U ranks of a group holds all heads of its s tokens; in attention it holds its
share of the heads of all U x s tokens, rank after rank (`SequenceLayout.cut_each` cuts them so). Query heads
go with their KV head. Where U divides the KV heads, each rank has equally many. Beyond, a KV head goes to
several ranks, which divide its query heads as evenly as they can (seven over two: four and three), and its
gradients are summed over them. That moves and stores a KV head several times, which all-gathered keys or a
ring do not: they are what Ulysses is combined with, over the ranks that have the same heads.
Source: DeepSpeed-Ulysses (arXiv 2309.14509), USP (arXiv 2405.07719).

Each rank sends (U - 1) / U of its q, k, v and outputs; all-gathering keys moves U - 1 times its k and v.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class HeadShare(NamedTuple):
    """Heads [first, last) that a rank has in attention, of queries and of keys."""

    queries: tuple[int, int]
    keys: tuple[int, int]


def divides_heads(size: int, queries: int, keys: int) -> bool:
    """Whether so many ranks can divide so many heads: each has whole KV heads, or query heads of one."""
    return keys % size == 0 or (size % keys == 0 and size // keys <= queries // keys)


def share_heads(size: int, queries: int, keys: int) -> tuple[HeadShare, ...]:
    """The heads of each rank; their number follows `divides_heads`."""
    each = queries // keys  # query heads of a KV head
    copies = max(1, size // keys)  # ranks that have the same KV head
    own = max(1, keys // size)  # KV heads of a rank
    shares = []
    for rank in range(size):
        first, place = rank // copies * own, rank % copies
        low, high = (-(-each * own * part // copies) for part in (place, place + 1))
        shares.append(HeadShare((first * each + low, first * each + high), (first, first + own)))
    return tuple(shares)


def _exchange(sent: Sequence[Tensor], rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """sent[i] [.., d] goes to rank i -> what came from each rank, `rows` of it: [rows, d]."""
    counts = [len(part) for part in sent]
    received = sent[0].new_empty((sum(rows), sent[0].shape[-1]))
    dist.all_to_all_single(received, torch.cat(tuple(sent)), list(rows), counts, group=group)
    return list(received.split(list(rows)))


def _spread(blocks: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """For each rank its heads [s, h_i, d] of own tokens -> own heads of all tokens [U * s, h, d]."""
    own = blocks[group.rank()]
    received = _exchange([x.flatten(0, 1) for x in blocks], [own[..., 0].numel()] * group.size(), group)
    spread: Tensor = torch.cat(received).unflatten(0, (-1, own.shape[1]))
    return spread


def _collect(x: Tensor, heads: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Own heads of all tokens [U * s, h, d] -> the heads of each rank, of own tokens: [s, heads[i], d]."""
    tokens = len(x) // group.size()
    received = _exchange([part.flatten(0, 1) for part in x.split(tokens)], [tokens * n for n in heads], group)
    return [part.unflatten(0, (tokens, n)) for part, n in zip(received, heads, strict=True)]


class TokensToHeads(torch.autograd.Function):
    """q [s, np, d], k and v [s, ng, d] -> of own heads q [U * s, hq, d], k and v [U * s, hk, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group, ctx.shares = group, share_heads(group.size(), q.shape[1], k.shape[1])
        blocks = [
            torch.cat([q[:, slice(*queries)], k[:, slice(*keys)], v[:, slice(*keys)]], dim=1)
            for queries, keys in ctx.shares
        ]
        q, k, v = _spread(blocks, group).split(_sizes(ctx.shares[group.rank()]), dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sizes = [_sizes(share) for share in ctx.shares]
        collected = _collect(torch.cat(grads, dim=1), [sum(each) for each in sizes], ctx.group)
        parts = [part.split(each, dim=1) for part, each in zip(collected, sizes, strict=True)]
        grad_q, grads_k, grads_v = zip(*parts, strict=True)
        copies = max(1, len(parts) * sizes[0][1] // ctx.shares[-1].keys[1])
        return torch.cat(grad_q, dim=1), _sum_copies(grads_k, copies), _sum_copies(grads_v, copies), None


class HeadsToTokens(torch.autograd.Function):
    """Outputs of own heads [U * s, hq, d] -> of all np `queries` heads [s, np, d], of ng `keys` heads."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, queries: int, keys: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.shares = group, share_heads(group.size(), queries, keys)
        return torch.cat(_collect(out, [_sizes(share)[0] for share in ctx.shares], group), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks = [grad[:, slice(*share.queries)] for share in ctx.shares]
        return _spread(blocks, ctx.group), None, None, None


def _sizes(share: HeadShare) -> list[int]:
    """Heads of queries, keys and values."""
    (first, last), (first_key, last_key) = share
    return [last - first, last_key - first_key, last_key - first_key]


def _sum_copies(grads: Sequence[Tensor], copies: int) -> Tensor:
    """Gradients of KV heads [s, hk, d], rank after rank -> [s, ng, d], copies of a head summed in fp32."""
    if copies == 1:
        return torch.cat(tuple(grads), dim=1)
    heads: Tensor = torch.cat(tuple(grads), dim=1).unflatten(1, (-1, copies))
    total: Tensor = heads[:, :, 0].float()
    for copy in range(1, copies):
        total = total + heads[:, :, copy]
    return total.to(heads.dtype)

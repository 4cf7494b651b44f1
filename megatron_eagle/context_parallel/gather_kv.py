"""Attention with gathered keys and values: queries stay, keys travel, head group by head group.

Every context parallel rank keeps its queries, receives the keys and values they see (`exchange.py`), and
runs one causal varlen attention. KV heads are taken in groups: while attention of a group runs, the
keys of the next travel. Backward receives the keys again instead of keeping them, adds up their gradients
in fp32, and sends them back to the ranks that hold the tokens while the next group is computed. All sums
have a fixed order.

The keys of two head groups exist at a time; those of a pack of 128K tokens with 4 heads are 0.27 GB in bf16.
Beside it stands the ring (`ring.py`), which holds two ranks' blocks of keys at a time, however long the pack.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_kernels.activation_offload import KeptResults
from megatron_eagle.context_parallel.attention_backend import AttentionBackend
from megatron_eagle.context_parallel.exchange import KVExchange
from megatron_eagle.context_parallel.key_order import fold_gradients, read_keys, sum_rows


def start_gather(
    kv: Tensor, exchange: KVExchange, group: dist.ProcessGroup | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin to gather keys and values; the returned function waits for them.

    Args:
        kv: [s, 2, h, d] of this rank's tokens, contiguous.
    Returns:
        a function that gives keys and values [keys, h, d], in the order that `exchange.segments` means.
    """
    work = None
    if exchange.kind == "none":
        received = kv
    else:
        received = kv.new_empty((exchange.num_received, *kv.shape[1:]))
        if exchange.ranges is None:
            work = dist.all_gather_into_tensor(received, kv, group=group, async_op=True)
        else:
            sent = kv.index_select(0, exchange.ranges.send_rows)
            counts = list(exchange.ranges.receive_counts), list(exchange.ranges.send_counts)
            work = dist.all_to_all_single(received, sent, *counts, group=group, async_op=True)

    def finish() -> tuple[Tensor, Tensor]:
        if work is not None:
            work.wait()
        return read_keys(received, exchange.order)

    return finish


def start_return(
    grad_k: Tensor, grad_v: Tensor, exchange: KVExchange, group: dist.ProcessGroup | None
) -> Callable[[], Tensor]:
    """Begin to send gradients of keys and values back to their tokens' ranks.

    Args:
        grad_k, grad_v: [keys, h, d] in the order that `exchange.segments` means.
    Returns:
        a function that waits and gives fp32 [s, 2, h, d]: the sum over all ranks, for this rank's tokens.
    """
    rows = fold_gradients(grad_k, grad_v, exchange.order)
    if exchange.kind == "none":
        return lambda: rows
    ranges = exchange.ranges
    if ranges is None:
        assert group is not None, "who gathers has a group"
        local = rows.new_empty((len(rows) // group.size(), *rows.shape[1:]))
        work = dist.reduce_scatter_tensor(local, rows.contiguous(), group=group, async_op=True)

        def finish_sum() -> Tensor:
            work.wait()
            return local

        return finish_sum

    count = sum(ranges.send_counts)
    returned = rows.new_zeros((count + 1, *rows.shape[1:]))
    counts = list(ranges.send_counts), list(ranges.receive_counts)
    work = dist.all_to_all_single(returned[:count], rows.contiguous(), *counts, group=group, async_op=True)

    def finish_rows() -> Tensor:
        work.wait()
        return sum_rows(returned, ranges.return_rows)

    return finish_rows


class GatherKVAttention(torch.autograd.Function):
    """q [s, np, d], k and v [s, ng, d] of this rank -> out [s, np, d].

    Args:
        backend: an `AttentionBackend`.
        exchange: this rank's part for this pack, on the device of q.
        scale: of the scores.
        group: the ranks of the exchange; None where there is nothing to exchange.
        parts: head groups, dividing ng.
        replay: of an offloaded layer, whose second run takes the results of the first; None: compute.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: AttentionBackend,
        exchange: KVExchange,
        scale: float,
        group: dist.ProcessGroup | None,
        parts: int,
        replay: KeptResults | None,
    ) -> Tensor:
        ctx.backend, ctx.exchange, ctx.scale, ctx.group, ctx.parts = backend, exchange, scale, group, parts

        def attend() -> tuple[Tensor, Tensor]:
            heads = _head_groups(q, k, parts)
            gathered_kv = _gathered(k, v, exchange, group, heads)
            outputs = [
                backend.forward(q[:, queries], keys, values, exchange.segments, scale, causal=True)
                for (queries, _), (keys, values) in zip(heads, gathered_kv, strict=True)
            ]
            return _joined([out for out, _ in outputs], 1), _joined([lse for _, lse in outputs], 0)

        out, lse = attend() if replay is None else replay.once(attend)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        exchange, group = ctx.exchange, ctx.group
        heads = _head_groups(q, k, ctx.parts)
        grads_q, returning = [], []
        for (queries, _), (keys, values) in zip(heads, _gathered(k, v, exchange, group, heads), strict=True):
            grad_q, grad_k, grad_v = ctx.backend.backward(
                grad_out[:, queries],
                q[:, queries],
                keys,
                values,
                out[:, queries],
                lse[queries],
                exchange.segments,
                ctx.scale,
                causal=True,
            )
            grads_q.append(grad_q)
            returning.append(start_return(grad_k, grad_v, exchange, group))
            del grad_k, grad_v, keys, values  # the next group's are about to exist
        grad_k, grad_v = _joined([finish().to(k.dtype) for finish in returning], 2).unbind(1)
        return _joined(grads_q, 1), grad_k, grad_v, None, None, None, None, None, None


def _head_groups(q: Tensor, k: Tensor, parts: int) -> list[tuple[slice, slice]]:
    """Heads of q and of k in each of `parts` groups."""
    query_heads, key_heads = q.shape[1] // parts, k.shape[1] // parts
    return [
        (slice(i * query_heads, (i + 1) * query_heads), slice(i * key_heads, (i + 1) * key_heads))
        for i in range(parts)
    ]


def _gathered(
    k: Tensor,
    v: Tensor,
    exchange: KVExchange,
    group: dist.ProcessGroup | None,
    heads: Sequence[tuple[slice, slice]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each head group; those of the next are on their way when one is handed out."""

    def start(own: slice) -> Callable[[], tuple[Tensor, Tensor]]:
        return start_gather(torch.stack([k[:, own], v[:, own]], dim=1), exchange, group)

    if exchange.kind == "none" and exchange.order is None:
        yield from ((k[:, own], v[:, own]) for _, own in heads)
        return
    pending = deque([start(heads[0][1])])
    for number in range(1, len(heads) + 1):
        if number < len(heads):
            pending.append(start(heads[number][1]))
        yield pending.popleft()()  # nothing here keeps what was received


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)

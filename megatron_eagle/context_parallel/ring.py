"""Ring attention: queries stay, blocks of keys and values go round, the next while one is attended to.

Every step's output and log-sum-exp are merged in fp32. Backward runs each block with the output and the
log-sum-exp of all of them, which gives the block's exact share of the gradients: dq is added up here, dk and
dv in fp32 follow their block round the ring one step behind it. A rank holds two blocks of keys at a time,
however many ranks there are. All sums have a fixed order: that of the ring.
Sources: Ring Attention (arXiv 2310.01889), zigzag order and the two-layer groups of USP (arXiv 2405.07719).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_kernels.activation_offload import KeptResults
from megatron_eagle.context_parallel.attention_backend import AttentionBackend
from megatron_eagle.context_parallel.key_order import fold_gradients, read_keys
from megatron_eagle.context_parallel.ring_plan import RingExchange, RingSlot, RingStep
from megatron_eagle.runtime.ring_groups import RingGroups


class RingAttention(torch.autograd.Function):
    """q [s, np, d], k and v [s, ng, d] of this rank -> out [s, np, d].

    Args:
        backend: an `AttentionBackend`.
        exchange: this rank's part for this pack, on the device of q.
        scale: of the scores.
        groups: whom keys come from and go to.
        replay: of an offloaded layer, whose second run takes the results of the first; None: compute.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: AttentionBackend,
        exchange: RingExchange,
        scale: float,
        groups: RingGroups,
        replay: KeptResults | None,
    ) -> Tensor:
        ctx.backend, ctx.exchange, ctx.scale, ctx.groups = backend, exchange, scale, groups

        def attend() -> tuple[Tensor, Tensor]:
            merged = _Merged()
            for step, block in _blocks(k, v, exchange, groups):
                if step is not None:
                    first, last = step.rows
                    keys, values = read_keys(block[slice(*step.keys)], step.order)
                    causal = merged.out is None  # the rank's own block comes first
                    merged.add(
                        step, *backend.forward(q[first:last], keys, values, step.segments, scale, causal)
                    )
            return merged.result(q.dtype)

        out, lse = attend() if replay is None else replay.once(attend)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        exchange, groups = ctx.exchange, ctx.groups
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        part = (len(k), 2, *k.shape[1:])  # of a block
        fresh = partial(torch.empty, part, dtype=torch.float32, device=k.device)
        own: Tensor | None = None  # of this rank's block
        leaving: Tensor | None = None  # of the block of the step before, or of the one before that
        finish_sum: Callable[[], Tensor | None] = _nothing  # of the step before, over the node
        blocks = _blocks(k, v, exchange, groups)
        for number, slot in enumerate(exchange.slots):
            step, block = next(blocks, (None, k))
            travelling = _Gradients(slot, leaving, fresh, groups.ring)
            share, share_rows = None, slice(None)
            if step is not None:
                first, last = step.rows
                rows = slice(first, last)
                keys, values = read_keys(block[slice(*step.keys)], step.order)
                share_q, share_k, share_v = ctx.backend.backward(
                    grad_out[rows],
                    q[rows],
                    keys,
                    values,
                    out[rows],
                    lse[:, rows],
                    step.segments,
                    ctx.scale,
                    causal=number == 0,
                )
                grad_q[rows] += share_q
                share, share_rows = fold_gradients(share_k, share_v, step.order), slice(*step.keys)
                del share_q, share_k, share_v, keys, values  # the next step's are about to exist
            if groups.node is not None:
                seen = number < len(exchange.steps) and exchange.gathered[number]
                start = _start_node_sum(share, share_rows, fresh, groups.node) if seen else _nothing
                share, share_rows, finish_sum = finish_sum(), slice(None), start
            arrived, home = travelling.wait()
            leaving = _add(arrived, share, share_rows, len(k))
            if number == exchange.lag - 1:
                own, leaving = leaving, None
            if home is not None:
                assert own is not None, "a rank sees its own keys"
                own += home
        assert own is not None, "a rank sees its own keys"
        grad_k, grad_v = own.to(k.dtype).unbind(1)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None, None


class _Merged:
    """Attention over the blocks so far."""

    def __init__(self) -> None:
        self.out: Tensor | None = None  # [s, np, d], fp32 from the second block on
        self.lse: Tensor | None = None  # fp32 [np, s]

    def add(self, step: RingStep, out: Tensor, lse: Tensor) -> None:
        """Weigh what there is and `out`, of the queries `step.rows`, by their sums of exponentials."""
        if self.out is None or self.lse is None:
            self.out, self.lse = out, lse
            return
        self.out = self.out.float()
        rows = slice(*step.rows)
        before, together = self.lse[:, rows], torch.logaddexp(self.lse[:, rows], lse)
        self.out[rows] = self.out[rows] * _by_row(before - together) + out * _by_row(lse - together)
        self.lse[:, rows] = together

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output in `dtype`, and log-sum-exp."""
        assert self.out is not None and self.lse is not None, "a rank sees its own keys"
        return self.out.to(dtype), self.lse


def _by_row(exponents: Tensor) -> Tensor:
    """[np, s] -> factors [s, np, 1]."""
    return exponents.exp().t().unsqueeze(-1)


def _blocks(
    k: Tensor, v: Tensor, exchange: RingExchange, groups: RingGroups
) -> Iterator[tuple[RingStep | None, Tensor]]:
    """Each step with its block; the next block is on its way when one is handed out.

    In a ring of nodes the parts of the next block are being gathered then, and those of the one after it
    travel between nodes.
    """
    part = torch.stack([k, v], dim=1)
    if groups.node is None:
        for step, slot in zip(exchange.steps, exchange.slots, strict=False):
            finish = _start_keys(slot, part, groups.ring)
            yield step, part
            part = finish()
        return
    coming = _start_keys(exchange.slots[0], part, groups.ring)
    block = _start_node_gather(part, exchange.gathered[0], groups.node)()
    part = coming()
    for number, step in enumerate(exchange.steps):
        more = number + 1 < len(exchange.steps)
        coming = _start_keys(exchange.slots[number + 1], part, groups.ring)
        gathering = _start_node_gather(part, more and exchange.gathered[number + 1], groups.node)
        yield step, block
        block, part = gathering(), coming()


def _start_keys(slot: RingSlot, part: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin to hand `part` on and to receive the next; the returned function waits for it.

    Without a next one it gives the same again, which nobody reads.
    """
    messages, received = [], part
    if slot.sends_keys_to is not None:
        messages.append(_message(dist.isend, part, slot.sends_keys_to, group))
    if slot.receives_keys_from is not None:
        received = torch.empty_like(part)
        messages.append(_message(dist.irecv, received, slot.receives_keys_from, group))
    works = dist.batch_isend_irecv(messages) if messages else []

    def finish() -> Tensor:
        for work in works:
            work.wait()
        return received

    return finish


class _Gradients:
    """The gradients of keys and values that travel during one step, fp32 [s, 2, ng, d] each."""

    def __init__(
        self,
        slot: RingSlot,
        leaving: Tensor | None,
        fresh: Callable[[], Tensor],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._arriving: Tensor | None = None
        self._home: Tensor | None = None
        self._works: list[dist.Work] = []
        messages = []
        if slot.sends_gradients_to is not None:
            assert leaving is not None, "a reader of the block has been here"
            messages.append(_message(dist.isend, leaving, slot.sends_gradients_to, group))
        if slot.receives_gradients_from is not None:
            self._arriving = fresh()
            messages.append(_message(dist.irecv, self._arriving, slot.receives_gradients_from, group))
        if slot.receives_own_from is not None:
            self._home = fresh()
            messages.append(_message(dist.irecv, self._home, slot.receives_own_from, group))
        if messages:
            self._works = dist.batch_isend_irecv(messages)

    def wait(self) -> tuple[Tensor | None, Tensor | None]:
        """Those of this step's block so far, and all others' of this rank's own block; None: none arrived."""
        for work in self._works:
            work.wait()
        return self._arriving, self._home


def _message(
    way: Callable[..., Any], tensor: Tensor, peer: int, group: dist.ProcessGroup | None
) -> dist.P2POp:
    assert group is not None, "whoever has a peer has a group"
    return dist.P2POp(way, tensor, group=group, group_peer=peer)


def _start_node_gather(part: Tensor, wanted: bool, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to gather the parts of a block over the ranks of a node; the returned function waits for them."""
    if not wanted:
        return lambda: part
    block = part.new_empty((group.size() * len(part), *part.shape[1:]))
    work = dist.all_gather_into_tensor(block, part, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return block

    return finish


def _nothing() -> None:
    """What a step ends with in which no rank of the node sees the block."""


def _start_node_sum(
    share: Tensor | None, rows: slice, fresh: Callable[[], Tensor], node: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """Begin to sum gradients of `rows` of a node's block over its ranks; the returned function waits, and
    gives those of this rank's part of it. Collective over `node`."""
    part = fresh()
    whole = _add(None, share, rows, node.size() * len(part))
    if whole is None:  # this rank's queries see nothing of the block
        whole = part.new_zeros((node.size() * len(part), *part.shape[1:]))
    work = dist.reduce_scatter_tensor(part, whole, group=node, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return part

    return finish


def _add(total: Tensor | None, share: Tensor | None, rows: slice, length: int) -> Tensor | None:
    """`total` [length, ...] and `share` of its `rows`; None: nothing."""
    if share is None or (total is None and len(share) == length):
        return total if share is None else share
    if total is None:
        total = share.new_zeros((length, *share.shape[1:]))
    total[rows] += share
    return total

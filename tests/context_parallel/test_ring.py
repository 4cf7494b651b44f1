"""The ring's plan, and that every part of it that can go wrong is noticed."""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_eagle.context_parallel import ring
from megatron_eagle.context_parallel.attention import context_parallel_attention
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.planning import LAYOUT_NAMES
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.context_parallel.ring_plan import RingExchange, plan_ring
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.context_parallel.test_context_parallel import (
    HEAD_DIM,
    LENGTH,
    PACKS,
    full_attention,
    pack_tensors,
    plan_for,
)
from tests.parallel.harness import launch

SIZE = 4


def plans(layout: SequenceLayout, bounds: list[int], node: int = 1) -> list[RingExchange]:
    return [plan_ring(layout, rank, bounds, node) for rank in range(layout.size)]


def check_messages(ring: list[RingExchange]) -> None:
    """Walk through the slots of a ring: whoever receives is sent to, in the same slot; who needs a block has
    it; the gradients of each block come home with one share of every reader."""
    size, lag = len(ring), ring[0].lag
    held = [{rank} for rank in range(size)]  # the block with each rank
    leaving: list[set[int]] = [set() for _ in range(size)]  # whose gradients each rank sends next
    summing = [[set[int]()] * (lag - 1) for _ in range(size)]  # those of a node's ranks, being added up
    home: list[set[int]] = [set() for _ in range(size)]
    for step in range(size + lag):
        now, bear = [plan.slots[step] for plan in ring], []
        for rank, slot in enumerate(now):
            behind = (rank - 1) % size
            assert (slot.receives_keys_from is not None) == (now[behind].sends_keys_to == rank)
            senders = [other for other in range(size) if now[other].sends_gradients_to == rank]
            expected = {slot.receives_gradients_from, slot.receives_own_from} - {None}
            assert set(senders) == expected and len(senders) == len(expected)
            if slot.receives_own_from is not None:
                home[rank] |= leaving[slot.receives_own_from]
            before = leaving[behind] if slot.receives_gradients_from is not None else set()
            sees = 0 < step < size and ring[rank].gathered[step]
            assert not sees or held[rank] == {(rank - step) % size}
            summing[rank].append({rank} if sees else set())
            bear.append(before | summing[rank].pop(0))
        leaving = bear
        held = [held[s.receives_keys_from] if s.receives_keys_from is not None else set() for s in now]
    for block in range(size):
        assert home[block] == {r for r in range(size) if r != block and ring[r].gathered[(r - block) % size]}


def count_seen(plan: RingExchange, layout: SequenceLayout, rank: int, node: int) -> np.ndarray:
    """int [own tokens, length]: how often each key is seen."""
    seen = np.zeros((layout.length // layout.size, layout.length), dtype=int)
    for number, step in enumerate(plan.steps):
        if step is None:
            continue
        first = (rank // node - number) % (layout.size // node) * node
        keys = torch.cat([layout.token_index(r) for r in range(first, first + node)])[slice(*step.keys)]
        keys = keys if step.order is None else keys[step.order.kv_rows]
        for part in step.segments:
            for row in range(part.q_start, part.q_end):
                hidden = part.q_end - 1 - row if number == 0 else 0
                seen[step.rows[0] + row, keys[part.k_start : part.k_end - hidden]] += 1
    return seen


@given(
    st.sampled_from(LAYOUT_NAMES),
    st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (5, 1)]),
    st.sets(st.integers(1, 159), max_size=12),
)
@settings(max_examples=25, deadline=None)
def test_messages_meet_and_every_key_is_seen_once(name, sizes, cuts):
    size, node = sizes
    bounds = [0, *sorted(cuts), 160]
    layout = plan_for(name, size, bounds)
    by_rank = plans(layout, bounds, node)
    for place in range(node):
        check_messages(by_rank[place::node])
    tokens = np.arange(layout.length)
    document = np.searchsorted(bounds, tokens, side="right")
    for rank, plan in enumerate(by_rank):
        own = layout.token_index(rank).numpy()[:, None]
        expected = (document[own] == document) & (tokens <= own)
        assert (count_seen(plan, layout, rank, node) == expected).all()


def test_documents_inside_ranks_make_the_ring_short():
    """Two documents over four ranks: keys go one step. Documents inside ranks: none at all."""
    layout = plan_for("contiguous", SIZE, [0, 48, 96])
    for plan in plans(layout, [0, 48, 96]):
        assert [step is not None for step in plan.steps[2:]] == [False, False]
        assert all(slot.sends_keys_to is None for slot in plan.slots[1:])
    for plan in plans(layout, [0, 24, 48, 72, 96]):
        assert all(value is None for slot in plan.slots for value in vars(slot).values())
        assert [step is None for step in plan.steps] == [False, True, True, True]


def test_zigzag_copies_no_keys():
    """Of one document, a block is seen whole or its first chunk alone: one segment, read where it lies."""
    layout = plan_for("zigzag", SIZE, [0, LENGTH])
    for rank, plan in enumerate(plans(layout, [0, LENGTH])):
        for number, step in enumerate(plan.steps[1:], 1):
            [segment], half = step.segments, LENGTH // SIZE // 2
            whole = (
                rank - number
            ) % SIZE > rank  # a later rank: both its chunks lie before this one's second
            assert step.order is None
            assert segment == ((0, half, 0, 2 * half) if whole else (0, 2 * half, 0, half))


def attend(name: str, pack: str, size: int = SIZE, node: int = 1) -> list[Tensor]:
    """On one rank of a ring: its tokens' output, dQ, dK, dV."""
    bounds = PACKS[pack]
    config = ParallelConfig(context_parallel_size=size, context_parallel_comm="ring", ring_node_size=node)
    with model_parallel(config) as mesh:
        layout = plan_for(name, size, bounds)
        index = layout.token_index(mesh.cp.rank)
        *inputs, grad = (x[index] for x in pack_tensors(bounds[-1], torch.float32))
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = context_parallel_attention(
            *leaves,
            ReferenceAttention(),
            plan_ring(layout, mesh.cp.rank, bounds, node),
            HEAD_DIM**-0.5,
            mesh.cp.group,
            ring=mesh.ring,
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(run: Callable, *arguments, size: int = SIZE) -> dict[str, float]:
    ranks = launch(run, size, *arguments, timeout=60)
    order = plan_for("zigzag", size, PACKS["off chunk edges"]).rank_major_order.argsort()
    found = (torch.cat(shares)[order].double() for shares in zip(*ranks, strict=True))
    whole = full_attention(PACKS["off chunk edges"], torch.float32)
    return {
        what: ((one - other).norm() / other.norm()).item()
        for what, one, other in zip(("out", "dq", "dk", "dv"), found, whole, strict=True)
    }


def _without_rescaling(self, step, out, lse) -> None:
    if self.out is None:
        self.out, self.lse = out, lse
        return
    rows = slice(*step.rows)
    self.out[rows] += out * (lse - torch.logaddexp(self.lse[:, rows], lse)).exp().t()[..., None]
    self.lse[:, rows] = torch.logaddexp(self.lse[:, rows], lse)


def _last_gradients_lost(self) -> tuple[Tensor | None, Tensor | None]:
    arrived, home = _wait(self)
    return arrived, None if home is None else torch.zeros_like(home)


def _sum_of_nobody(share, rows, fresh, node):
    finish = _start_sum(share, rows, fresh, node)
    return lambda: torch.zeros_like(finish())


def _nothing_sent(slot, part, group):
    return _start(slot, torch.zeros_like(part) if slot.sends_keys_to is not None else part, group)


class _AlwaysCausal(ReferenceAttention):
    def forward(self, q, k, v, segments, scale, causal):
        return super().forward(q, k, v, segments, scale, causal=True)

    def backward(self, grad, q, k, v, out, lse, segments, scale, causal):
        return super().backward(grad, q, k, v, out, lse, segments, scale, causal=True)


class _NeverCausal(ReferenceAttention):
    def forward(self, q, k, v, segments, scale, causal):
        return super().forward(q, k, v, segments, scale, causal=False)


_wait, _start, _start_sum = ring._Gradients.wait, ring._start_keys, ring._start_node_sum
SABOTAGES = {
    "nothing": (lambda: patch.object(ring, "_start_keys", _start), ()),
    "a dropped send": (lambda: patch.object(ring, "_start_keys", _nothing_sent), ("out", "dq", "dk", "dv")),
    "a merge without rescaling": (
        lambda: patch.object(ring._Merged, "add", _without_rescaling),
        ("out", "dq", "dk"),
    ),
    "dk of the last step": (
        lambda: patch.object(ring._Gradients, "wait", _last_gradients_lost),
        ("dk", "dv"),
    ),
    "causal everywhere": (
        lambda: patch.dict(globals(), ReferenceAttention=_AlwaysCausal),
        ("out", "dq", "dk", "dv"),
    ),
    "causal nowhere": (
        lambda: patch.dict(globals(), ReferenceAttention=_NeverCausal),
        ("out", "dq", "dk", "dv"),
    ),
}


def sabotaged(what: str) -> list[Tensor]:
    with SABOTAGES[what][0]():
        return attend("zigzag", "off chunk edges")


@pytest.mark.parametrize("what", SABOTAGES)
def test_every_fault_is_noticed(what):
    noticed = {name for name, error in errors(sabotaged, what).items() if not error <= 1e-5}
    assert noticed == set(SABOTAGES[what][1])


def of_nodes(start_sum: str) -> list[Tensor]:
    with patch.object(ring, "_start_node_sum", globals()[start_sum]):
        return attend("zigzag", "off chunk edges", 8, 2)


@pytest.mark.parametrize(("start_sum", "wrong"), [("_start_sum", set()), ("_sum_of_nobody", {"dk", "dv"})])
def test_gradients_two_steps_behind_come_home(start_sum, wrong):
    """Round four nodes of two ranks, each of which adds up a step's gradients during the next one."""
    found = errors(of_nodes, start_sum, size=8)
    assert {name for name, error in found.items() if not error <= 1e-5} == wrong

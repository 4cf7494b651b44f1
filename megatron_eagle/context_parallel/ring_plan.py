"""How the keys of one pack go round a ring: computed on the host, nothing is negotiated.

Rank r of n starts with its own block of keys. In step t it has that of the rank t before it, and hands it on
as long as somebody further on has queries that see one of its keys. Where documents end inside ranks, the
ring is short. Ranges of tokens of different ranks are disjoint, so keys of another rank lie before a run of
queries or after it: they are seen whole or not at all, and only a rank's own block needs the causal mask.

Gradients of a block are born one rank behind it: the first reader hands them to the next rank in the slot
after its step, that one adds its own, and the last reader sends them home. A slot is what travels while a
step is computed; both ends of a message meet in the same slot, so that no order of messages can lock ranks.

In a ring of nodes a block is what the ranks of one node hold together: each sends its own part to its
counterpart of the next node, where the parts are gathered. Gradients are then two slots behind: they are
summed over the node while the step after theirs is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from megatron_eagle.context_parallel.exchange import Traffic, measure_traffic
from megatron_eagle.context_parallel.key_order import KeyOrder
from megatron_eagle.context_parallel.layout import Segment, SequenceLayout, expand


@dataclass(frozen=True, eq=False)
class RingStep:
    """What a rank's queries see of one block."""

    rows: tuple[int, int]  # local queries [first, last) that cover all which see a key of the block
    keys: tuple[int, int]  # rows [first, last) of the block that cover all keys which are seen
    segments: tuple[Segment, ...]  # counted from the first of `rows` and in rows of the keys as they are read
    order: KeyOrder | None  # from the block's rows `keys` to keys as they are read; None: as they are


@dataclass(frozen=True)
class RingSlot:
    """What travels while step t is computed: ranks of the ring, None for nothing."""

    sends_keys_to: int | None  # the block of step t
    receives_keys_from: int | None  # the block of step t + 1
    sends_gradients_to: int | None  # of the block of step t - lag
    receives_gradients_from: int | None  # of the block of step t + 1 - lag, of those who had it before
    receives_own_from: int | None  # of this rank's own block, of all others together


@dataclass(frozen=True, eq=False)
class RingExchange:
    """One rank's part in the round of a pack's keys."""

    steps: tuple[RingStep | None, ...]  # by step; None: no key of the block is seen
    slots: tuple[RingSlot, ...]  # by step, and `lag` more for the last gradients
    lag: int  # slots from a step to that in which its gradients leave
    gathered: tuple[bool, ...]  # by step: whether a rank of the node sees the block

    @property
    def kind(self) -> Literal["ring"]:
        """As `KVExchange` has it."""
        return "ring"

    def each(self, function: Callable[[Tensor], Tensor]) -> "RingExchange":
        """The same with `function` of its index tensors."""
        return replace(
            self,
            steps=tuple(
                step and replace(step, order=step.order and step.order.each(function)) for step in self.steps
            ),
        )


def readers(traffic: Traffic, node: int = 1) -> np.ndarray:
    """bool [n, n]: whether a rank of one node (first) sees a key that another (second) holds.

    Args:
        node: ranks of a node, adjacent.
    """
    size = len(traffic.keys)
    nodes = (traffic.keys > 0).reshape(size // node, node, size // node, node)
    return np.asarray(nodes.any(axis=(1, 3)))


def plan_ring(
    layout: SequenceLayout,
    rank: int,
    document_bounds: Sequence[int],
    node: int = 1,
    traffic: Traffic | None = None,
) -> RingExchange:
    """The part of `rank` of the group that holds `layout`.

    Args:
        node: adjacent ranks that gather the parts of a block, dividing the layout's ranks.
        traffic: `measure_traffic` of the same, where it is known.
    """
    traffic = traffic or measure_traffic(layout, document_bounds)
    reads = readers(traffic, node)
    size, own = len(reads), rank // node
    nearest, farthest = _distances(reads, min), last_readers(reads)
    lag = 1 if node == 1 else 2
    table = layout.segment_table(rank, document_bounds)
    steps: list[RingStep | None] = []
    for step in range(size):
        block = (own - step) % size
        held = expand(np.concatenate(layout.ranges[block * node : (block + 1) * node]))
        steps.append(_plan_step(table, held, causal=step == 0))
    return RingExchange(
        tuple(steps),
        tuple(_plan_slot(own, step, lag, nearest, farthest) for step in range(size + lag)),
        lag,
        tuple(bool(reads[own, (own - step) % size]) for step in range(size)),
    )


def last_readers(reads: np.ndarray) -> list[int]:
    """How far ahead in the ring each block's last reader is; 0: its owner alone reads it."""
    return _distances(reads, max)


def _distances(reads: np.ndarray, which: Callable[..., int]) -> list[int]:
    """How far ahead in the ring the reader of each block is that is first (min) or last (max)."""
    size = len(reads)
    ahead = ([d for d in range(1, size) if reads[(block + d) % size, block]] for block in range(size))
    return [which(distances, default=0) for distances in ahead]


def _plan_slot(own: int, step: int, lag: int, nearest: list[int], farthest: list[int]) -> RingSlot:
    size, done = len(nearest), step - lag  # the step whose gradients leave
    had, meets, has, comes = ((own - s) % size for s in (done, done + 1, step, step + 1))  # blocks
    ahead, behind = (own + 1) % size, (own - 1) % size
    bears = done > 0  # of the first step nobody has gradients of others' blocks
    return RingSlot(
        sends_keys_to=ahead if step < farthest[has] else None,
        receives_keys_from=behind if step + 1 < size and step < farthest[comes] else None,
        sends_gradients_to=(ahead if done < farthest[had] else had)
        if bears and nearest[had] <= done <= farthest[had]
        else None,
        receives_gradients_from=behind
        if bears and done + 1 < size and nearest[meets] <= done < farthest[meets]
        else None,
        receives_own_from=(own + done) % size if bears and done == farthest[own] else None,
    )


def _plan_step(table: np.ndarray, held: np.ndarray, causal: bool) -> RingStep | None:
    """What the queries of `table` (`SequenceLayout.segment_table`) see of the tokens `held` by a block."""
    by_token = np.argsort(held, kind="stable")
    first, last = (np.searchsorted(held[by_token], table[:, side]) for side in (2, 3))
    document = table[:, 2]
    first, last = np.where(first < last, first, 0), np.where(first < last, last, 0)
    rows = np.stack([table[:, 0], table[:, 1]], axis=1)
    if not causal:
        # Neighbours that see the same keys, or none, are one segment.
        new = np.ones(len(first), dtype=bool)
        new[1:] = (first[1:] != first[:-1]) | (last[1:] != last[:-1])
        ends = np.append(np.flatnonzero(new)[1:], len(new)) - 1
        rows = np.stack([rows[new, 0], rows[ends, 1]], axis=1)
        first, last, document = first[new], last[new], document[new]
    seeing = np.flatnonzero(first < last)
    if not len(seeing):
        return None
    part = slice(seeing[0], seeing[-1] + 1)
    rows, first, last, document = rows[part], first[part], last[part], document[part]
    sizes = last - first
    key_rows = by_token[expand(np.stack([first, last], axis=1))]
    low, high = int(key_rows.min()), int(key_rows.max()) + 1
    ends = sizes.cumsum()
    start = int(rows[0, 0])
    segments = np.stack([rows[:, 0] - start, rows[:, 1] - start, ends - sizes, ends], axis=1)
    return RingStep(
        rows=(start, int(rows[-1, 1])),
        keys=(low, high),
        segments=tuple(Segment(*each) for each in segments.tolist()),
        order=KeyOrder.of(document, sizes, key_rows - low, high - low),
    )

"""Which keys travel between context parallel ranks for one pack: computed on the host, nothing is negotiated.

Queries stay where they are. A rank needs the keys from the start of each of its documents up to its last
token of that document. Either exactly those keys are exchanged (`ranges`), or all keys are gathered
everywhere (`gather`); if no rank needs a foreign key, nothing is (`none`). `exchange_choice.py` chooses.

Keys are received by sender, each sender's in the order it holds them, and read segment after segment
(`key_order.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.context_parallel.key_order import KeyOrder
from megatron_eagle.context_parallel.layout import Segment, SequenceLayout, expand


@dataclass(frozen=True, eq=False)
class KVExchange:
    """One rank's part in the exchange of a pack's keys. s: its tokens; r: rows it receives, its own too."""

    kind: Literal["none", "ranges", "gather"]
    segments: tuple[Segment, ...]  # what the local queries see, in rows of `keys`
    num_received: int  # r
    order: KeyOrder | None  # None: keys are received in the order in which attention reads them
    ranges: "KeyRanges | None"  # of the kind `ranges`

    def each(self, function: Callable[[Tensor], Tensor]) -> "KVExchange":
        """The same with `function` of its index tensors."""
        order, ranges = self.order, self.ranges
        return replace(
            self,
            order=order and order.each(function),
            ranges=ranges
            and replace(
                ranges, send_rows=function(ranges.send_rows), return_rows=function(ranges.return_rows)
            ),
        )


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """Which keys travel where only the needed ones do."""

    send_rows: Tensor  # int64: local rows, by receiver
    send_counts: tuple[int, ...]  # rows to each rank
    receive_counts: tuple[int, ...]  # rows from each rank
    # Where the gradients of local row i arrive: int64 [most receivers of a row, s], sum(send_counts) for
    # nowhere.
    return_rows: Tensor


@dataclass(frozen=True, eq=False)
class Traffic:
    """What all ranks of a layout need of a pack."""

    needed: np.ndarray  # bool [size, length]: whether the rank's queries see the token's key
    keys: np.ndarray  # int [size, size]: keys that a rank (first) needs of those that another (second) holds

    @property
    def received(self) -> np.ndarray:
        """int [size]: keys of other ranks that each needs."""
        return np.asarray(self.keys.sum(axis=1) - self.keys.diagonal())

    @property
    def sent(self) -> np.ndarray:
        """int [size]: keys that each must send, counted once per receiver."""
        return np.asarray(self.keys.sum(axis=0) - self.keys.diagonal())

    def from_nodes(self, node: int) -> "Traffic":
        """Of keys that come from another node alone; `node` adjacent ranks are on one."""
        nodes = np.arange(len(self.keys)) // node
        return replace(self, keys=self.keys * (nodes[:, None] != nodes))


def measure_traffic(layout: SequenceLayout, document_bounds: Sequence[int]) -> Traffic:
    """Mark and count the keys that each rank needs."""
    needed = np.zeros((layout.size, layout.length), dtype=bool)
    keys = np.zeros((layout.size, layout.size), dtype=np.int64)
    for rank in range(layout.size):
        table = layout.segment_table(rank, document_bounds)
        last = np.append(table[1:, 2] != table[:-1, 2], True)  # of each document
        first, end = table[last, 2], table[last, 3]
        needed[rank, expand(np.stack([first, end], axis=1))] = True
        keys[rank] = (layout.held_before(end) - layout.held_before(first)).sum(axis=0)
    return Traffic(needed, keys)


def plan_exchange(
    layout: SequenceLayout,
    rank: int,
    document_bounds: Sequence[int],
    kind: Literal["none", "ranges", "gather"],
    traffic: Traffic | None = None,
) -> KVExchange:
    """The part of `rank` of the group that holds `layout`.

    Args:
        document_bounds: 0, the ends of all documents but the last, and the pack's length.
        kind: "none" only where no rank needs a foreign key.
        traffic: `measure_traffic` of the same, where it is known.
    """
    traffic = traffic or measure_traffic(layout, document_bounds)
    needed = traffic.needed if kind != "gather" else np.ones_like(traffic.needed)
    order = layout.rank_major_order.numpy()
    held = order.reshape(layout.size, -1)
    received = order[needed[rank][order]]  # token of each received row
    row = np.empty(layout.length, dtype=np.int64)
    row[received] = np.arange(len(received))

    table = layout.segment_table(rank, document_bounds)
    sizes = table[:, 3] - table[:, 2]
    ends = sizes.cumsum()
    starts = ends - sizes
    tokens = np.concatenate([np.arange(start, end) for start, end in table[:, 2:].tolist()])
    kv_rows = row[tokens]
    ranges = None
    if kind == "ranges":
        wanted = needed[:, held[rank]]  # [receiver, own row]
        ranges = KeyRanges(
            send_rows=torch.from_numpy(np.nonzero(wanted)[1]),
            send_counts=tuple(wanted.sum(axis=1).tolist()),
            receive_counts=tuple(needed[rank][held].sum(axis=1).tolist()),
            return_rows=torch.from_numpy(_return_rows(wanted)),
        )
    return KVExchange(
        kind=kind,
        segments=tuple(
            Segment(*part) for part in np.stack([table[:, 0], table[:, 1], starts, ends], axis=1).tolist()
        ),
        num_received=len(received),
        order=KeyOrder.of(table[:, 2], sizes, kv_rows, len(received)),
        ranges=ranges,
    )


def _return_rows(wanted: np.ndarray) -> np.ndarray:
    """bool [receiver, own row] -> int64 [most receivers, own row] rows of what the receivers send back, in
    the order of their ranks, so that sums have one order."""
    place = np.where(wanted, wanted.ravel().cumsum().reshape(wanted.shape) - 1, wanted.sum())
    return np.sort(place, axis=0)[: wanted.sum(axis=0).max()]

"""Which keys travel between context parallel ranks for one pack: computed on the host, nothing is negotiated.

Queries stay where they are. A rank needs the keys from the start of each of its documents up to its last
token of that document. If the busiest rank would receive or send well under what an all-gather moves, exactly
those keys are exchanged (`ranges`); if no rank needs a foreign key, nothing is (`none`); else all keys are
gathered everywhere (`gather`).

Two orders of keys occur:
    received   as the collective delivers them: by sender, each sender's in the order it holds them
    keys       as attention reads them: one run per segment, so that one varlen call does all segments.
               Keys that several segments of a rank see occur once in each.
Gradients return by tables of rows to add up, not by scattering: sums have one order, and a table is one
kernel however many segments there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment, SequenceLayout

# `ranges` replaces the all-gather below this part of its traffic. Not 1: point-to-point messages reach less
# of a link's bandwidth than a ring, and an NVLink switch multicasts an all-gather. Not measured yet.
RANGES_BELOW = 0.5


@dataclass(frozen=True, eq=False)
class KVExchange:
    """One rank's part in the exchange of a pack's keys. s: its tokens; r: rows it receives, its own too."""

    kind: Literal["none", "ranges", "gather"]
    segments: tuple[Segment, ...]  # what the local queries see, in rows of `keys`
    num_received: int  # r
    order: "KeyOrder | None"  # None: keys are received in the order in which attention reads them
    ranges: "KeyRanges | None"  # of the kind `ranges`

    def each(self, function: Callable[[Tensor], Tensor]) -> "KVExchange":
        """The same with `function` of its index tensors."""
        order, ranges = self.order, self.ranges
        return replace(
            self,
            order=order and KeyOrder(function(order.kv_rows), function(order.fold_rows)),
            ranges=ranges
            and replace(
                ranges, send_rows=function(ranges.send_rows), return_rows=function(ranges.return_rows)
            ),
        )


@dataclass(frozen=True, eq=False)
class KeyOrder:
    """From received rows to keys and back."""

    kv_rows: Tensor  # int64 [keys]: received row of each
    fold_rows: Tensor  # int64 [most, r]: keys whose gradients a received row adds up, `keys` for none


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
    received: np.ndarray  # int [size]: keys of other ranks that it needs
    sent: np.ndarray  # int [size]: keys that it must send, counted once per receiver

    def kind(self, ranges_below: float = RANGES_BELOW) -> Literal["none", "ranges", "gather"]:
        """The cheapest exchange, the same on every rank."""
        size, length = self.needed.shape
        busiest = max(self.received.max(), self.sent.max())
        if busiest == 0:
            return "none"
        return "ranges" if busiest < ranges_below * (length - length // size) else "gather"


def measure_traffic(layout: SequenceLayout, document_bounds: Sequence[int]) -> Traffic:
    """Mark the keys that each rank needs."""
    needed = np.zeros((layout.size, layout.length), dtype=bool)
    for rank in range(layout.size):
        table = layout.segment_table(rank, document_bounds)
        change = np.zeros(layout.length + 1, dtype=np.int32)
        np.add.at(change, table[:, 2], 1)
        np.add.at(change, table[:, 3], -1)
        needed[rank] = change.cumsum()[:-1] > 0
    share = layout.length // layout.size
    readers = needed.sum(axis=0)[layout.rank_major_order.numpy()].reshape(layout.size, share)
    return Traffic(needed, needed.sum(axis=1) - share, readers.sum(axis=1) - share)


def plan_exchange(
    layout: SequenceLayout, rank: int, document_bounds: Sequence[int], ranges_below: float = RANGES_BELOW
) -> KVExchange:
    """The part of `rank` of the group that holds `layout`.

    Args:
        document_bounds: 0, the ends of all documents but the last, and the pack's length.
        ranges_below: part of the all-gather's traffic below which only the needed keys are exchanged.
    """
    traffic = measure_traffic(layout, document_bounds)
    kind = traffic.kind(ranges_below)
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
    in_order = len(kv_rows) == len(received) and bool((kv_rows == np.arange(len(received))).all())
    order_of_keys = None
    if not in_order:
        folds = _fold_rows(table, kv_rows, len(received))
        order_of_keys = KeyOrder(torch.from_numpy(kv_rows), torch.from_numpy(folds))
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
        order=order_of_keys,
        ranges=ranges,
    )


def _fold_rows(table: np.ndarray, kv_rows: np.ndarray, num_received: int) -> np.ndarray:
    """Where each received row occurs among the keys: once in some of its document's segments."""
    _, document, count = np.unique(table[:, 2], return_inverse=True, return_counts=True)
    order = np.argsort(document, kind="stable")
    number = np.empty(len(table), dtype=np.int64)  # of the segment among its document's
    number[order] = np.arange(len(table)) - np.repeat(count.cumsum() - count, count)
    folds = np.full((count.max(), num_received), len(kv_rows))
    folds[np.repeat(number, table[:, 3] - table[:, 2]), kv_rows] = np.arange(len(kv_rows))
    return folds


def _return_rows(wanted: np.ndarray) -> np.ndarray:
    """bool [receiver, own row] -> int64 [most receivers, own row] rows of what the receivers send back, in
    the order of their ranks, so that sums have one order."""
    place = np.where(wanted, wanted.ravel().cumsum().reshape(wanted.shape) - 1, wanted.sum())
    return np.sort(place, axis=0)[: wanted.sum(axis=0).max()]

"""How the keys of a pack travel: gathered by all, by the ranges that are needed, or round a ring.

`parallel.context_parallel_comm` says so for all packs, or leaves it to `auto`, which estimates all three for
each pack and takes the quickest that fits. The estimate is in whole numbers of query-key pairs and reads
nothing but the pack's documents, `ASSUMED` and the configuration: every rank comes to the same choice without
asking another. That is also why the memory for keys is a setting (`context_parallel_key_gb`), and not what is
left on some rank.

What is compared, of the rank that has most: attention, in steps of a ring that all wait for the slowest rank;
and what of the transfer attention cannot hide. Of gathered keys that is the first head group's, of a ring
whatever a step's attention is too short for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from megatron_eagle.context_parallel.exchange import KVExchange, Traffic, measure_traffic, plan_exchange
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.ring_plan import RingExchange, last_readers, plan_ring, readers
from megatron_eagle.runtime.parallel import KeyComm

Kind = Literal["none", "gather", "ranges", "ring"]
EXCHANGE_KINDS: tuple[Kind, ...] = get_args(Kind)
KeyExchange = KVExchange | RingExchange


@dataclass(frozen=True)
class Assumed:
    """What is assumed of machines. None of it has been measured on the machine that runs."""

    attention: float = 400e12  # FLOP/s of attention, forward and backward
    dense: float = 600e12  # FLOP/s of other matrix products
    node: float = 300e9  # byte/s into a rank from the ranks of its node
    network: float = 40e9  # byte/s into a rank where some are on other nodes
    messages: float = (
        0.5  # part of that which many messages at once reach: a collective multicasts, they do not
    )
    memory: float = 3e12  # byte/s of a device's memory
    step: float = 30e-6  # s of a ring's step for launches, forward and backward


ASSUMED = Assumed()


@dataclass(frozen=True)
class ExchangeCosts:
    """Of a layer (`model.flops.exchange_costs`), in query-key pairs of a rank's heads."""

    key: int  # a key from another rank of the node, forward and backward
    far_key: int  # a key from another node
    node: int  # adjacent ranks, of those that exchange keys, that are on one node
    step: int  # a step of a ring
    merge: int  # a query whose outputs, and gradients, of one more step are added up
    head_groups: int  # in which gathered keys travel, one after the other
    most_keys: int  # that may be gathered


@dataclass(frozen=True)
class KeyUse:
    """What the keys of a pack amount to over all ranks; times in query-key pairs, of the busiest rank."""

    kind: Kind
    keys: int  # that ranks read, their own among them
    foreign: int  # of these, other ranks'
    pairs: int  # time of attention, estimated
    exposed: int  # of this, the wait for keys


@dataclass(frozen=True, order=True)
class Estimate:
    """Of an exchange, in query-key pairs that take as long."""

    pairs: int  # attention with it
    exposed: int  # of these, transfer that attention does not hide


def choose_exchange(
    layout: SequenceLayout,
    document_bounds: Sequence[int],
    traffic: Traffic,
    comm: KeyComm,
    costs: ExchangeCosts,
) -> Kind:
    """The exchange that `comm` means for a pack, the same on every rank."""
    busiest = int(max(traffic.received.max(), traffic.sent.max()))
    if busiest == 0:
        return "none"
    if comm != "auto":
        return comm
    return _quickest(estimate(layout, document_bounds, traffic, costs), layout, traffic, costs)


def _quickest(
    estimates: dict[Kind, Estimate], layout: SequenceLayout, traffic: Traffic, costs: ExchangeCosts
) -> Kind:
    fitting = {
        kind: found
        for kind, found in estimates.items()
        if kind == "ring" or kept_keys(kind, layout, traffic) <= costs.most_keys
    }
    return min(fitting, key=lambda kind: fitting[kind])


def kept_keys(kind: Kind, layout: SequenceLayout, traffic: Traffic) -> int:
    """Keys that a rank holds at one time, at most."""
    share = layout.length // layout.size
    most = {"none": 0, "gather": layout.length - share, "ranges": int(traffic.received.max()), "ring": share}
    return share + most[kind]


def estimate(
    layout: SequenceLayout,
    document_bounds: Sequence[int],
    traffic: Traffic,
    costs: ExchangeCosts,
    node: int = 1,
) -> dict[Kind, Estimate]:
    """What each exchange takes.

    Args:
        node: adjacent ranks that gather what goes round the ring.
    """
    share = layout.length // layout.size
    pairs = pairs_by_block(layout, document_bounds)
    attention = int(pairs.sum(axis=1).max())
    slowest = costs.key if layout.size <= costs.node else costs.far_key  # of links that all keys take

    def gathered(transfer: int) -> Estimate:
        first = transfer // costs.head_groups
        exposed = first + max(transfer - first - attention, 0)
        return Estimate(attention + exposed, exposed)

    ranks, nodes = np.arange(layout.size), layout.size // node
    blocks = pairs.reshape(layout.size, nodes, node).sum(axis=2)
    last = last_readers(readers(traffic, node))
    # A block is gathered in a node during the step before, as the next one travels; nothing hides the first.
    gathering = (node - 1) * share * (costs.key if node <= costs.node else costs.far_key)
    ring = exposed = gathering
    for step in range(max(last) + 1):
        busiest = int(blocks[ranks, (ranks // node - step) % nodes].max())
        travelling = max(share * slowest, gathering) if step < max(last) else 0
        ring += max(busiest, travelling) + costs.step + (share * costs.merge if step else 0)
        exposed += max(travelling - busiest, 0)
    far = traffic.from_nodes(costs.node)
    messages = [
        int((costs.key * (all_keys - far_keys) + costs.far_key * far_keys).max())
        for all_keys, far_keys in ((traffic.received, far.received), (traffic.sent, far.sent))
    ]
    return {
        "gather": gathered((layout.length - share) * slowest),
        "ranges": gathered(round(max(messages) / ASSUMED.messages)),
        "ring": Estimate(ring, exposed),
    }


def pairs_by_block(layout: SequenceLayout, document_bounds: Sequence[int]) -> np.ndarray:
    """int64 [size, size]: query-key pairs of a rank's queries with the keys that another (second) holds."""
    found = np.empty((layout.size, layout.size), dtype=np.int64)
    for rank in range(layout.size):
        table = layout.segment_table(rank, document_bounds)
        rows, first, end = table[:, 1] - table[:, 0], table[:, 2], table[:, 3]
        # All of a segment's queries see the keys before them, and of the segment's own, one more each.
        before = layout.held_before(end - rows) - layout.held_before(first)
        found[rank] = (rows[:, None] * before).sum(axis=0)
        found[rank, rank] += (rows * (rows + 1) // 2).sum()
    return found


def plan_keys(
    layout: SequenceLayout,
    rank: int,
    document_bounds: Sequence[int],
    comm: KeyComm,
    costs: ExchangeCosts,
    node: int = 1,
) -> tuple[KeyUse, KeyExchange]:
    """What the keys of a pack amount to in the exchange that is chosen for it, and the part of `rank` of the
    group that holds `layout`.

    Args:
        document_bounds: 0, the ends of all documents but the last, and the pack's length.
        node: adjacent ranks that gather what goes round the ring.
    """
    traffic = measure_traffic(layout, document_bounds)
    foreign = int(traffic.received.sum())
    if foreign:
        estimates = estimate(layout, document_bounds, traffic, costs, node)
        kind: Kind = comm if comm != "auto" else _quickest(estimates, layout, traffic, costs)
        found = estimates[kind]
    else:
        busiest = int(pairs_by_block(layout, document_bounds).sum(axis=1).max())
        kind, found = "none", Estimate(busiest, 0)
    use = KeyUse(kind, layout.length + foreign, foreign, found.pairs, found.exposed)
    if kind == "ring":
        return use, plan_ring(layout, rank, document_bounds, node, traffic)
    return use, plan_exchange(layout, rank, document_bounds, kind, traffic)

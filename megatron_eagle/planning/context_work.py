"""What context parallelism makes of the packs of a data set: which keys travel, how even attention's work is.

Layouts and exchanges are planned as in training (`context_parallel`) and counted; nothing is assumed of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_eagle.context_parallel.balanced import PairCosts, causal_area
from megatron_eagle.context_parallel.exchange import measure_traffic
from megatron_eagle.context_parallel.exchange_choice import ExchangeCosts, choose_exchange
from megatron_eagle.context_parallel.layout import expand
from megatron_eagle.context_parallel.padding import pad_documents
from megatron_eagle.context_parallel.planning import LayoutName, plan_layout
from megatron_eagle.context_parallel.ring_plan import last_readers, readers
from megatron_eagle.runtime.parallel import KeyComm, ParallelConfig


@dataclass(frozen=True)
class ContextWork:
    """Means over packs."""

    remote_keys: float  # tokens whose keys the busiest rank receives from others, or sends
    imbalance: float  # attention's work of the busiest rank over the mean, weighted by the packs' work


def context_work(
    parallel: ParallelConfig, packs: Sequence[Sequence[int]], costs: PairCosts, exchange: ExchangeCosts
) -> ContextWork:
    """Plan and count the layout of typical packs.

    Args:
        packs: document bounds of typical packs of one length that the layout divides.
        costs, exchange: of the model on this layout.
    """
    size = parallel.context_parallel_size // parallel.ulysses_parallel_size
    if size == 1:
        return ContextWork(0.0, 1.0)
    name, chunk_size = parallel.context_parallel_layout, parallel.context_parallel_chunk_size
    multiple = 2 * parallel.context_parallel_size if parallel.pad_documents else 1
    counts = [
        _count(
            name,
            size,
            chunk_size,
            multiple,
            tuple(bounds),
            costs,
            parallel.key_comm,
            exchange,
            parallel.ring_node_size,
        )
        for bounds in packs
    ]
    foreign, busiest, mean = np.mean(counts, axis=0)
    return ContextWork(float(foreign), float(busiest / mean))


@lru_cache(maxsize=4096)
def _count(
    name: LayoutName,
    size: int,
    chunk_size: int | None,
    multiple: int,
    bounds: tuple[int, ...],
    costs: PairCosts,
    comm: KeyComm,
    exchange: ExchangeCosts,
    ring_node: int,
) -> tuple[int, int, float]:
    """Of one pack: foreign keys, and query-key pairs of the busiest rank and on average."""
    if multiple > 1:
        bounds = tuple(pad_documents(bounds[-1], bounds, multiple, multiple)[0])
    length = bounds[-1]
    layout = plan_layout(name, length, size, bounds, chunk_size, costs=costs, node=exchange.node)
    traffic = measure_traffic(layout, bounds)
    rounds = max(last_readers(readers(traffic, ring_node)))
    foreign = {
        "none": 0,
        "ranges": int(max(traffic.received.max(), traffic.sent.max())),
        "gather": length - length // size,
        # The blocks of a node are gathered in every round, its own first.
        "ring": ((rounds + 1) * ring_node - 1) * (length // size),
    }[choose_exchange(layout, bounds, traffic, comm, exchange)]
    work = np.diff(causal_area(np.arange(length + 1), bounds))
    loads = [int(work[expand(own)].sum()) for own in layout.ranges]
    return foreign, max(loads), sum(loads) / size

"""Context parallel layouts by simulation: balance, bytes and step time of Eagle2.5-8B at 128K tokens.

Nothing is run on a device: layouts and exchanges are planned as in training and their work is counted. The
model of time, per rank: work outside attention as `model/flops.py` counts it at 600 TFLOP/s; attention 14 x
128 FLOPs a pair and head (forward and backward, with the kernel's recomputation) at 400 TFLOP/s, in whole
128 x 128 tiles; foreign keys at 300 GB/s, and at 40 GB/s where the ranks are on several nodes of eight.

Columns: `step` is the busiest rank's computing time over that of perfect balance without rounding to tiles
(`worst`: of the worst pack); `+ keys` adds the exchange of keys as far as the head groups cannot hide it
(all of the first of four), `+ keys, not hidden` all of it. Bytes are those of the busiest rank. How keys
travel is what `bench.py context_parallel` compares.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from benchmarks.context_cost import (
    COSTS,
    HEAD_DIM,
    KEY_HEADS,
    LAYERS,
    MODEL,
    NODE,
    QUERY_HEADS,
    token_seconds,
)
from benchmarks.context_packs import made_up_packs, store_packs
from benchmarks.report import Report, progress

from megatron_eagle.context_parallel.exchange import measure_traffic
from megatron_eagle.context_parallel.exchange_choice import ASSUMED, choose_exchange
from megatron_eagle.context_parallel.planning import LAYOUT_NAMES, LayoutName, plan_layout, sequence_multiple
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import exchange_costs
from megatron_eagle.runtime.parallel import ParallelConfig

LENGTH, SIZES = 131072, (2, 4, 8, 16)
TILE = 128
# A foreign key of one layer: k and v in bf16 forward and again backward, their gradients in fp32.
KEY_BYTES = 2 * KEY_HEADS * HEAD_DIM * (2 + 2 + 4)


@dataclass(frozen=True)
class Outcome:
    """One pack under one layout. Areas in query-key pairs of one head, keys in tokens."""

    busiest: int  # area of the rank with most, in whole tiles
    tiles: float  # mean over ranks
    exact: float  # mean over ranks, without rounding to tiles
    foreign: int  # keys of other ranks that the busiest rank receives (or sends)
    gathered: int  # what it would receive with an all-gather
    segments: int  # of the rank with most
    plan_ms: float
    link: float  # byte/s into a rank

    def waiting(self, hidden: bool) -> float:
        """Seconds of a step in which the exchange of keys holds up the computation."""
        exchange = LAYERS * self.foreign * KEY_BYTES / self.link
        if not hidden:
            return exchange
        first = exchange / KEY_HEADS
        return first + max(exchange - first - _attention(self.busiest), 0)

    def slow_down(self, share: int, pairs: int, waiting: float = 0.0) -> float:
        """Time of a rank with `share` tokens and `pairs` over that of perfect balance."""
        return (_dense(share) + _attention(pairs) + waiting) / (_dense(share) + _attention(self.exact))


def _dense(tokens: int) -> float:
    return token_seconds() * tokens


def _attention(pairs: float) -> float:
    return 14 * pairs * HEAD_DIM * QUERY_HEADS * LAYERS / ASSUMED.attention


def simulate(name: LayoutName, size: int, bounds: Sequence[int]) -> Outcome:
    """Plan one pack and count its work."""
    length = bounds[-1]
    start = time.perf_counter()
    layout = plan_layout(name, length, size, bounds, costs=COSTS)
    plan_ms = 1000 * (time.perf_counter() - start)
    traffic = measure_traffic(layout, bounds)
    gathered = length - length // size
    busiest_link = int(max(traffic.received.max(), traffic.sent.max()))
    costs = exchange_costs(MODEL, ParallelConfig(context_parallel_size=size), ranks_per_node=NODE)
    kind = choose_exchange(layout, bounds, traffic, "auto", costs)
    tables = [layout.segment_table(rank, bounds) for rank in range(size)]
    tiles = [_tiled_area(table) for table in tables]
    sizes = np.diff(bounds)
    return Outcome(
        busiest=max(tiles),
        tiles=sum(tiles) / size,
        exact=float((sizes * (sizes + 1) // 2).sum()) / size,
        foreign={"none": 0, "ranges": busiest_link, "gather": gathered, "ring": gathered}[kind],
        gathered=gathered,
        segments=max(len(table) for table in tables),
        plan_ms=plan_ms,
        link=ASSUMED.node if size <= NODE else ASSUMED.network,
    )


def _tiled_area(table: np.ndarray) -> int:
    """Pairs in the tiles that a kernel computes for these segments (`SequenceLayout.segment_table`)."""
    area = 0
    for first, last, first_key, last_key in table.tolist():
        rows = np.minimum(np.arange(TILE, last - first + TILE, TILE), last - first)
        keys = last_key - first_key - (last - first) + rows  # seen by the last row of each row of tiles
        area += int((-(-keys // TILE)).sum()) * TILE * TILE
    return area


def run(packs: str | None = None, plot: str | None = None) -> Report:
    """Simulate every layout, size and kind of pack.

    Args:
        packs: a store's length folder whose packs take the place of the five made-up kinds.
        plot: PNG to write.
    """
    length, kinds = LENGTH, made_up_packs(LENGTH)
    if packs is not None:
        own = store_packs(packs)
        length, kinds = own.length, {own.name: own.bounds[:: max(1, len(own.bounds) // 64)]}
    rows: list[dict[str, Any]] = []
    for kind, members in kinds.items():
        progress(kind)
        for size in SIZES:
            for name in get_args(LayoutName):
                if length % (multiple := sequence_multiple(name, size)):
                    progress(f"  CP {size}, {name}: left out, {length} tokens are no multiple of {multiple}")
                    continue
                outcomes = [simulate(name, size, bounds) for bounds in members]
                rows.append({"pack": kind, "CP": size, "layout": name} | _summary(outcomes, length // size))
    if plot:
        _plot(rows, plot)
    return Report(f"Eagle2.5-8B, {length:,} tokens, simulated; means over the packs of a kind", rows)


def _summary(outcomes: list[Outcome], share: int) -> dict[str, float | int | str]:
    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    def slow_down(outcome: Outcome, waiting: float) -> float:
        return outcome.slow_down(share, outcome.busiest, waiting)

    hidden, exposed = ([o.waiting(hide) for o in outcomes] for hide in (True, False))
    foreign, gathered = mean(o.foreign for o in outcomes), outcomes[0].gathered
    return {
        "step": round(mean(o.slow_down(share, o.busiest) for o in outcomes), 4),
        "worst": round(max(o.slow_down(share, o.busiest) for o in outcomes), 4),
        "+ keys": round(mean(map(slow_down, outcomes, hidden)), 4),
        "+ keys, not hidden": round(mean(map(slow_down, outcomes, exposed)), 4),
        "attention max/mean": round(mean(o.busiest / o.tiles for o in outcomes), 3),
        "tile waste": round(mean(o.tiles / o.exact for o in outcomes), 3),
        "MB a layer": round(foreign * KEY_BYTES / 1e6, 1),
        "saved %": round(100 * (1 - foreign / gathered), 1),
        "segments": max(o.segments for o in outcomes),
        "plan ms": round(min(o.plan_ms for o in outcomes), 2),
    }


def _plot(rows: list[dict[str, Any]], path: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    kinds = list(dict.fromkeys(row["pack"] for row in rows))
    figure = Figure(figsize=(3.2 * len(kinds), 5.5), layout="constrained")
    axes = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(kinds):
        for name in LAYOUT_NAMES:
            own = [row for row in rows if (row["pack"], row["layout"]) == (kind, name)]
            for axis, quantity in zip(axes[:, column], ("step", "MB a layer"), strict=True):
                axis.plot([row["CP"] for row in own], [row[quantity] for row in own], "o-", label=name)
        axes[0, column].set_title(kind, fontsize=10)
        axes[1, column].set_xlabel("context parallel ranks")
        axes[1, column].set_xscale("log", base=2)
    axes[0, 0].set_ylabel("step time, 1 = perfect balance")
    axes[1, 0].set_ylabel("keys received, MB a layer")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)

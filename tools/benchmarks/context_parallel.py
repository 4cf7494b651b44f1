"""Context parallel layouts by simulation: balance, bytes and step time of Eagle2.5-8B at 128K tokens.

Nothing is run on a device: layouts and exchanges are planned as in training and their work is counted. The
model of time, per rank: work outside attention 6 x 6.53e9 FLOPs a token at 600 TFLOP/s; attention 14 x 128
FLOPs a pair and head (forward and backward, with the kernel's recomputation) at 400 TFLOP/s, in whole 128 x
128 tiles; foreign keys at 300 GB/s.

Columns: `step` is the busiest rank's computing time over that of perfect balance without rounding to tiles
(`worst`: of the worst pack); `+ keys` adds the exchange of keys as far as the head groups cannot hide it
(all of the first of four), `+ keys, not hidden` all of it. `ring` is `step` without tiles if keys went round
point to point instead, each step as long as its busiest rank; `ring + keys` adds the transfers that a step is
too short to hide, over the network where there are more than eight ranks, and the merging of outputs. `auto`
is what `parallel.context_parallel_comm` auto takes by its own estimate, for how many packs. Bytes are those
of the busiest rank.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from benchmarks.report import Report, progress

from megatron_eagle.context_parallel.exchange import measure_traffic
from megatron_eagle.context_parallel.exchange_choice import choose_exchange, estimate, pairs_by_block
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.planning import LAYOUT_NAMES, LayoutName, plan_layout, sequence_multiple
from megatron_eagle.data.packing.index import read_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import exchange_costs, pair_costs
from megatron_eagle.model.presets import preset
from megatron_eagle.planning.planner import sample_bounds
from megatron_eagle.runtime.parallel import ParallelConfig

LENGTH, SIZES = 131072, (2, 4, 8, 16)
LAYERS, QUERY_HEADS, KEY_HEADS, HEAD_DIM, PARAMETERS = 28, 28, 4, 128, 6.53e9
DENSE_RATE, ATTENTION_RATE, LINK = 600e12, 400e12, 300e9
TILE = 128
MODEL = preset("eagle2.5-8b").complete()
COSTS = pair_costs(MODEL)
# A foreign key of one layer: k and v in bf16 forward and again backward, their gradients in fp32.
KEY_BYTES = 2 * KEY_HEADS * HEAD_DIM * (2 + 2 + 4)
SEEDS = 8
REAL_PACKS = 64  # of a pack index, evenly spread


@dataclass(frozen=True)
class Outcome:
    """One pack under one layout. Areas in query-key pairs of one head, keys in tokens."""

    busiest: int  # area of the rank with most, in whole tiles
    tiles: float  # mean over ranks
    exact: float  # mean over ranks, without rounding to tiles
    ring: int  # sum over a ring's steps of the rank with most, without rounding to tiles
    ring_keys: int  # the same with transfers and merging, as `auto` estimates it
    kind: str  # of the exchange that `auto` takes
    foreign: int  # keys of other ranks that the busiest rank receives (or sends)
    gathered: int  # what it would receive with an all-gather
    segments: int  # of the rank with most
    plan_ms: float

    def waiting(self, hidden: bool) -> float:
        """Seconds of a step in which the exchange of keys holds up the computation."""
        exchange = LAYERS * self.foreign * KEY_BYTES / LINK
        if not hidden:
            return exchange
        first = exchange / KEY_HEADS
        return first + max(exchange - first - _attention(self.busiest), 0)

    def slow_down(self, share: int, pairs: int, waiting: float = 0.0) -> float:
        """Time of a rank with `share` tokens and `pairs` over that of perfect balance."""
        return (_dense(share) + _attention(pairs) + waiting) / (_dense(share) + _attention(self.exact))


def _dense(tokens: int) -> float:
    return 6 * PARAMETERS * tokens / DENSE_RATE


def _attention(pairs: float) -> float:
    return 14 * pairs * HEAD_DIM * QUERY_HEADS * LAYERS / ATTENTION_RATE


def made_up_packs() -> dict[str, list[list[int]]]:
    """Document bounds of the five kinds of packs, several of each kind that is random."""
    kinds: dict[str, Callable[[random.Random], float]] = {
        "lognormal, mean 8K": lambda r: r.lognormvariate(math.log(8000) - 0.72, 1.2),
        "video mix": lambda r: r.uniform(300, 4000) if r.random() < 0.7 else r.uniform(16000, 64000),
        "chat 200-2000": lambda r: r.uniform(200, 2000),
    }
    packs = {"one 128K document": [[0, LENGTH]], "96K + 32K": [[0, 98304, LENGTH]]}
    for name, draw in kinds.items():
        packs[name] = []
        for seed in range(SEEDS):
            generator, bounds = random.Random(seed), [0]
            while bounds[-1] < LENGTH:
                bounds.append(min(LENGTH, bounds[-1] + max(32, int(draw(generator)))))
            packs[name].append(bounds)
    return packs


def real_packs(folder: str) -> tuple[int, dict[str, Sequence[Sequence[int]]]]:
    """Length and document bounds of packs of `folder`, a store's D/<length>.

    Raises:
        UserError: no such store or no pack index.
    """
    path = Path(folder)
    if not path.name.isdigit():
        raise UserError(f"{folder}: name a length of a store, such as D/131072")
    length = int(path.name)
    store = SampleStore(path.parent, length)
    bounds = sample_bounds(store.column("n_tokens").to_numpy(), read_packs(store), length, REAL_PACKS)
    return length, {f"{len(bounds)} packs of {path}": bounds}


def simulate(name: LayoutName, size: int, bounds: Sequence[int]) -> Outcome:
    """Plan one pack and count its work."""
    length = bounds[-1]
    start = time.perf_counter()
    layout = plan_layout(name, length, size, bounds, costs=COSTS)
    plan_ms = 1000 * (time.perf_counter() - start)
    traffic = measure_traffic(layout, bounds)
    gathered = length - length // size
    busiest_link = int(max(traffic.received.max(), traffic.sent.max()))
    costs = exchange_costs(MODEL, ParallelConfig(context_parallel_size=size), ranks_per_node=8)
    kind = choose_exchange(layout, bounds, traffic, "auto", costs)
    tables = [layout.segment_table(rank, bounds) for rank in range(size)]
    tiles = [_tiled_area(table) for table in tables]
    sizes = np.diff(bounds)
    return Outcome(
        busiest=max(tiles),
        tiles=sum(tiles) / size,
        exact=float((sizes * (sizes + 1) // 2).sum()) / size,
        ring=_ring_area(layout, bounds),
        ring_keys=estimate(layout, bounds, traffic, costs)["ring"].pairs,
        kind=kind,
        foreign={"none": 0, "ranges": busiest_link, "gather": gathered, "ring": gathered}[kind],
        gathered=gathered,
        segments=max(len(table) for table in tables),
        plan_ms=plan_ms,
    )


def _tiled_area(table: np.ndarray) -> int:
    """Pairs in the tiles that a kernel computes for these segments (`SequenceLayout.segment_table`)."""
    area = 0
    for first, last, first_key, last_key in table.tolist():
        rows = np.minimum(np.arange(TILE, last - first + TILE, TILE), last - first)
        keys = last_key - first_key - (last - first) + rows  # seen by the last row of each row of tiles
        area += int((-(-keys // TILE)).sum()) * TILE * TILE
    return area


def _ring_area(layout: SequenceLayout, bounds: Sequence[int]) -> int:
    """Pairs of the rank with most in each step of a ring, added up: in step i, keys of the rank i before."""
    pairs, ranks = pairs_by_block(layout, bounds), np.arange(layout.size)
    return int(sum(pairs[ranks, (ranks - step) % layout.size].max() for step in ranks))


def run(packs: str | None = None, plot: str | None = None) -> Report:
    """Simulate every layout, size and kind of pack.

    Args:
        packs: a store's length folder whose packs take the place of the five made-up kinds.
        plot: PNG to write.
    """
    length, kinds = (LENGTH, made_up_packs()) if packs is None else real_packs(packs)
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
        "ring": round(mean(o.slow_down(share, o.ring) for o in outcomes), 4),
        "ring + keys": round(mean(o.slow_down(share, o.ring_keys) for o in outcomes), 4),
        "auto": ", ".join(f"{kind} {n}" for kind, n in Counter(o.kind for o in outcomes).most_common()),
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

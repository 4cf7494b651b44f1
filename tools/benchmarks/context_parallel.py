"""Ways of context parallelism in one table: who waits, what is exposed, what keys take, which is quickest.

Counted rows: Eagle2.5-8B in nodes of eight, layouts and exchanges planned as in training, their work counted
(`context_cost.py` has the rates and what is assumed; no device is run). First one pack over 2 to 64 ranks, by
every way that divides heads and tokens. Then whole global batches of a mix's packs, four ranks a pack, with K
packs a sequence (`data.packs_per_sequence`), dealt as the loader does it, one pack a data parallel rank and,
in a row of its own, two; tiles are encoded by all ranks of a sequence.

Columns: `costliest/mean` is the computing time of the costliest rank over the mean of all ranks; `exposed %`
the exchange that nothing hides (of a ring also waiting for others' steps, and merging) over perfect balance;
`step` both together, over perfect balance; `keys MB` what a rank holds at a time of foreign and own keys and
their gradients, most; `far keys %` keys from other nodes, of a pack, most of any rank; `auto` what
`parallel.context_parallel_comm: auto` takes, for how many sequences; `wins` marks the quickest way of a pack.

Wall rows: seconds of the real code's forward and backward on this machine's CPU, four processes with gloo
(`context_wall.py`), beside the counted balance of the same packs.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from benchmarks.context_cost import (
    LAYERS,
    MODEL,
    NODE,
    WAYS,
    Cost,
    Way,
    cost,
    layer_seconds,
    patch_seconds,
    plan,
    token_seconds,
)
from benchmarks.context_packs import Packs, join_bounds, made_up_packs, mixed_packs, store_packs
from benchmarks.context_wall import wall_rows
from benchmarks.report import Report, progress

from megatron_eagle.data.packing.balance import deal, pack_costs
from megatron_eagle.model.flops import patch_cost
from megatron_eagle.runtime.parallel import ParallelConfig

LENGTHS, SIZES = (32768, 131072, 1048576), (2, 4, 8, 16, 32, 64)
RANKS, DATA_PARALLEL, PACKS_PER_SEQUENCE = 4, (8, 16, 32), (1, 2, 4, 8)
STEPS = 6  # global batches, at most


def run(packs: str | None = None, large: bool = False) -> Report:
    """Count every way and every K, and time the real code.

    Args:
        packs: a store's length folder whose packs take the place of the made-up ones.
        large: not the quickest and `auto` alone, but every way.
    """
    own = None if packs is None else store_packs(packs)
    rows = []
    for length in LENGTHS if own is None else (own.length,):
        kinds = (
            made_up_packs(length) if own is None else {own.name: own.bounds[:: len(own.bounds) // 16 or 1]}
        )
        for kind, members in kinds.items():
            for size in SIZES:
                rows += one_pack_rows(kind, members, size)
        progress(f"{length:,} tokens")
    for data_parallel in DATA_PARALLEL:
        rows += batch_rows(own or mixed_packs(), data_parallel)
        progress(f"whole batches of {data_parallel} data parallel ranks")
    rows += wall_rows()
    if not large:
        shown = ("gather", "ranges", "ring")
        rows = [row for row in rows if row["wins"] or row["way"] in shown or "," in row["packs"]]
    return Report("Eagle2.5-8B, counted (one pack, whole batches) and timed (wall)", rows, "--large" * large)


def one_pack_rows(kind: str, members: Sequence[Sequence[int]], size: int) -> list[dict[str, Any]]:
    """One row a way: means over the packs `members` of a kind."""
    rows = []
    for way in WAYS:
        costs = _costs(way, members, size)
        if not costs:
            continue
        parallel = way.parallel(size)
        assert parallel is not None, "it has a cost"
        ratios = [_ratios(parallel, bounds[-1], found) for bounds, found in zip(members, costs, strict=True)]
        uneven, exposed, step = np.mean(ratios, axis=0)
        rows.append(
            _row(
                packs=kind,
                tokens=members[0][-1],
                ranks=size,
                nodes=max(1, size // NODE),
                way=way.name,
                uneven=uneven,
                exposed=exposed,
                step=step,
                costs=costs,
            )
        )
    if rows:
        min(rows, key=lambda row: float(row["step"]))["wins"] = "*"
    return rows


def _costs(way: Way, members: Sequence[Sequence[int]], size: int) -> list[Cost]:
    parallel = way.parallel(size)
    if parallel is None:
        return []
    planned = [plan(parallel, bounds) for bounds in members]
    return [cost(parallel, b, found) for b, found in zip(members, planned, strict=True) if found is not None]


def _ratios(parallel: ParallelConfig, length: int, found: Cost) -> tuple[float, float, float]:
    """Costliest rank, what is exposed, and both, over perfect balance."""
    outside = token_seconds() * length / parallel.context_parallel_size
    attention = LAYERS * layer_seconds(parallel, found.pairs.mean())
    ideal = outside + attention
    computing, exposed = outside + LAYERS * found.attention, LAYERS * (found.exposed + found.heads)
    return computing / ideal, exposed / ideal, (computing + exposed) / ideal


def batch_rows(packs: Packs, data_parallel: int) -> list[dict[str, Any]]:
    """Whole global batches over `data_parallel` x `RANKS` ranks, a row for each K."""
    rows = []
    for per_rank, each in [*((1, k) for k in PACKS_PER_SEQUENCE if k <= data_parallel), (2, 1)]:
        size = data_parallel * per_rank
        steps = [np.arange(s, s + size) for s in range(0, len(packs.bounds) - size + 1, size)][:STEPS]
        if not steps:
            progress(f"  {per_rank} packs a rank of {data_parallel}: left out, {packs.name} has fewer packs")
            continue
        found = [_batch(packs, step, data_parallel // each, each) for step in steps]
        uneven, exposed, step = np.mean([ratios for ratios, _ in found], axis=0)
        rows.append(
            _row(
                packs=f"{packs.name}, DP {data_parallel}, {per_rank} a rank",
                tokens=packs.length * each,
                ranks=RANKS * each,
                nodes=max(1, RANKS * each // NODE),
                way=f"K = {each}",
                uneven=uneven,
                exposed=exposed,
                step=step,
                costs=[one for _, costs in found for one in costs],
                pack=packs.length,
            )
        )
    compared = [row for row in rows if row["packs"].endswith(" 1 a rank")]
    if compared:
        min(compared, key=lambda row: float(row["step"]))["wins"] = "*"
    return rows


def _batch(
    packs: Packs, numbers: np.ndarray, groups: int, each: int
) -> tuple[tuple[float, float, float], list[Cost]]:
    """One global batch: ratios as `_ratios`, over all ranks, and what each sequence costs."""
    parallel = ParallelConfig(context_parallel_size=RANKS * each)
    weights = pack_costs(packs.sum_squares[numbers], packs.patches[numbers], patch_cost(MODEL))
    costs, ranks, times = [], [], []
    for group in deal(weights, groups, each):
        load, seconds = np.zeros(RANKS * each), 0.0
        for positions in group:
            members = numbers[positions]
            bounds = join_bounds([packs.bounds[number] for number in members], packs.length)
            planned = plan(parallel, bounds)
            assert planned is not None, "balanced divides any such length"
            found = cost(parallel, bounds, planned)
            computing = (
                token_seconds() * packs.length / RANKS
                + patch_seconds() * packs.patches[members].sum() / (RANKS * each)
                + LAYERS * layer_seconds(parallel, 1) * found.pairs
            )
            load += computing
            seconds += computing.max() + LAYERS * found.exposed
            costs.append(found)
        ranks.append(load)
        times.append(seconds)
    mean = np.concatenate(ranks).mean()
    uneven, step = np.concatenate(ranks).max() / mean, max(times) / mean
    return (float(uneven), float(step - uneven), float(step)), costs


def _row(
    *,
    packs: str,
    tokens: int,
    ranks: int,
    nodes: int,
    way: str,
    uneven: float,
    exposed: float,
    step: float,
    costs: Sequence[Cost],
    pack: int | None = None,
) -> dict[str, Any]:
    kinds = Counter(found.kind for found in costs)
    return {
        "packs": packs,
        "tokens": tokens,
        "ranks": ranks,
        "nodes": nodes,
        "way": way,
        "costliest/mean": round(float(uneven), 4),
        "exposed %": round(100 * float(exposed), 2),
        "step": round(float(step), 4),
        "keys MB": round(max(found.key_bytes for found in costs) / 1e6, 1),
        "far keys %": round(100 * max(found.far_keys for found in costs) / (pack or tokens), 1),
        "auto": ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()),
        "wins": "",
        "wall s": "-",
    }

"""Wall times of context parallel attention as it is, on four CPU processes with gloo.

A layer's attention alone, forward and backward, by the reference backend: what a process computes is what its
layout gives it, and what it waits for is real messages. CPU cores are fewer than ranks of a node, so that
times say that the code runs and what its messages cost beside each other, not how a GPU divides its time.
"""

import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmarks.context_cost import COSTS, WAYS, Way
from benchmarks.context_packs import Packs, join_bounds, made_up_packs
from benchmarks.report import progress

from megatron_eagle.context_parallel.attention import context_parallel_attention
from megatron_eagle.context_parallel.balanced import causal_area
from megatron_eagle.context_parallel.exchange_choice import ExchangeCosts, plan_keys
from megatron_eagle.context_parallel.planning import plan_layout
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.data.packing.balance import deal
from megatron_eagle.runtime.device import Device
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel

RANKS, TOKENS, REPEATS = 4, 1024, 3
KINDS = ("one document", "chat 200-2000")
QUERY_HEADS, KEY_HEADS, HEAD_DIM = 8, 4, 32
ATTENTION_ALONE = replace(COSTS, token=0)
# Nothing is chosen here: ways are named.
NO_CHOICE = ExchangeCosts(key=1, far_key=1, node=RANKS, step=1, merge=1, head_groups=1, most_keys=2**31)
_ULYSSES_RING = Way("Ulysses 2 x ring", "ring", ulysses=2)


def wall_rows() -> list[dict[str, Any]]:
    """A row for each way of one pack over four ranks, and for one, two and four of four packs a sequence."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "rows.json")
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(rank, folder, results)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        rows: list[dict[str, Any]] = json.loads(results.read_text())
    return rows


def _rank(rank: int, folder: str, results: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron's
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    rows, packs = [], made_up_packs(TOKENS)
    with Device("cpu").context():
        for kind in KINDS:
            for way in (*WAYS, _ULYSSES_RING):
                parallel = _config(way)
                if parallel is not None:
                    rows.append(_one_pack(kind, packs[kind][0], way, parallel))
        rows += [_packs_together(each) for each in (1, 2, 4)]
    if rank == 0:
        results.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _config(way: Way) -> ParallelConfig | None:
    """As `Way.parallel`, with nodes of two ranks."""
    if way.in_node and way.ulysses == 1:
        return ParallelConfig(context_parallel_size=RANKS, context_parallel_comm="ring", ring_node_size=2)
    return way.parallel(RANKS)


def _one_pack(kind: str, bounds: Sequence[int], way: Way, parallel: ParallelConfig) -> dict[str, Any]:
    with model_parallel(parallel) as mesh:
        seconds, uneven = _time(*_attend(mesh, bounds))
    if dist.get_rank() == 0:
        progress(f"  {kind}, {way.name}: {seconds:.3f} s")
    return _row(kind, TOKENS, RANKS, way.name, seconds, uneven)


def _packs_together(each: int) -> dict[str, Any]:
    """Four packs, of which one is a single document, `each` of them a sequence."""
    kinds = made_up_packs(TOKENS)
    members = [kinds["one document"][0], *kinds["chat 200-2000"][:3]]
    packs = Packs("uneven", TOKENS, members, np.zeros(RANKS))
    with model_parallel(ParallelConfig(context_parallel_size=each)) as mesh:
        [positions] = deal(packs.sum_squares, RANKS // each, each)[mesh.dp.rank]
        seconds, uneven = _time(*_attend(mesh, join_bounds([members[i] for i in positions], TOKENS)))
    return _row("one document, three chats", TOKENS * each, each, f"K = {each}", seconds, uneven)


def _attend(mesh: Mesh, bounds: Sequence[int]) -> tuple[Callable[[], None], int]:
    """A function that does forward and backward of a sequence, and this rank's query-key pairs."""
    ulysses = mesh.config.ulysses_parallel_size
    name, size = mesh.config.context_parallel_layout, mesh.cp.size // ulysses
    key_layout = plan_layout(name, bounds[-1], size, bounds, costs=ATTENTION_ALONE)
    place = mesh.cp.rank // ulysses
    _, keys = plan_keys(
        key_layout, place, bounds, mesh.config.key_comm, NO_CHOICE, mesh.config.ring_node_size
    )
    ulysses_group, key_group = mesh.groups.hcp if ulysses > 1 else (None, mesh.cp.group)
    own = len(key_layout.cut_each(ulysses).token_index(mesh.cp.rank))
    q = torch.randn(own, QUERY_HEADS, HEAD_DIM, requires_grad=True)
    k, v = (torch.randn(own, KEY_HEADS, HEAD_DIM, requires_grad=True) for _ in range(2))

    def step() -> None:
        out = context_parallel_attention(
            q, k, v, ReferenceAttention(), keys, HEAD_DIM**-0.5, key_group, ulysses_group, mesh.ring
        )
        torch.autograd.grad(out.sum(), (q, k, v))

    ranges = key_layout.ranges[place]
    return step, int(np.diff(causal_area(ranges, bounds)).sum())


def _time(step: Callable[[], None], pairs: int) -> tuple[float, float]:
    """Median seconds of the slowest rank, and pairs of the rank with most over the mean."""
    step()
    found = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        step()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append(float(seconds))
    most, total = torch.tensor(pairs), torch.tensor(pairs)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return median(found), float(most * RANKS / total)


def _row(kind: str, tokens: int, ranks: int, way: str, seconds: float, uneven: float) -> dict[str, Any]:
    return {
        "packs": f"CPU, gloo: {kind}",
        "tokens": tokens,
        "ranks": ranks,
        "nodes": 0,
        "way": way,
        "costliest/mean": round(uneven, 4),
        "exposed %": "-",
        "step": "-",
        "keys MB": "-",
        "far keys %": "-",
        "auto": "-",
        "wins": "",
        "wall s": round(seconds, 3),
    }

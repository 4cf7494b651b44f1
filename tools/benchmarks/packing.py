"""Packing: fill, time and balance of ours beside its peers, on a short and on a long mix of samples.

Short: 25 % text, 50 % pictures of 1 to 13 tiles, 25 % videos of 8 to 24 frames, into packs of 32,768 tokens.
Long: the videos have 64 to 512 frames, into packs of 131,072.  A tile costs 256 tokens, a frame 6 more.

A step is 8 ranks with one pack each, the hardest case, or with 8 packs each; packs come in a random order.
Ours are shared among the ranks as the loader does it, the peers' in turn.  A step is even if the costliest
rank has at most 5 % more to do (`megatron_eagle.data.packing.balance`) than the mean.  A short sample is one
of less than a sixteenth of a pack.
"""

import bisect
import heapq
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from benchmarks.report import REPO, Report, interleaved, progress

from megatron_eagle.data.packing.balance import assign, pack_costs
from megatron_eagle.data.packing.best_fit import pack_rows
from megatron_eagle.model.flops import patch_cost
from megatron_eagle.model.presets import preset

PEERS_LIMIT, BALANCE_LIMIT = 200_000, 20_000  # samples; beyond them only what grows slowly is measured
RANKS = 8
BALANCE = ("even steps % (1 pack a rank)", "p95", "even steps % (8)", "short samples %")
PATCHES_PER_TILE = 1024


@dataclass(frozen=True)
class Mix:
    """Samples: tokens and tiles of each, and the tokens of a pack."""

    name: str
    lengths: np.ndarray
    tiles: np.ndarray
    capacity: int


def short_mix(count: int) -> Mix:
    """Text, pictures and short videos, seeded."""
    generator = np.random.default_rng(0)
    kind = generator.choice(3, count, p=[0.25, 0.5, 0.25])
    text = generator.integers(50, 1500, count)
    frames = generator.integers(8, 25, count)
    tiles = np.choose(kind, [0, generator.integers(1, 14, count), frames])
    return Mix("short", text + 256 * tiles + np.where(kind == 2, 6 * frames, 0), tiles, 32768)


def long_mix(count: int) -> Mix:
    """Text, pictures and long videos, which lose frames where they would not fit, seeded."""
    generator = np.random.default_rng(0)
    kind = generator.choice(3, count, p=[0.25, 0.5, 0.25])
    text = generator.integers(50, 1500, count)
    frames = np.minimum(generator.integers(64, 513, count), (131072 - text) // 262)
    tiles = np.choose(kind, [0, generator.integers(1, 14, count), frames])
    return Mix("long", text + 256 * tiles + np.where(kind == 2, 6 * frames, 0), tiles, 131072)


Packs = list[list[int]]


def ours(mix: Mix) -> Packs:
    """This project's packer."""
    packing = pack_rows(mix.lengths, mix.capacity, 0, tiles=mix.tiles)
    return [packing[i].tolist() for i in range(len(packing))]


def least_loaded(mix: Mix) -> Packs:
    """The public Eagle code: the least number of packs and 20 more are open from the start, and each sample,
    longest first, goes to the emptiest.  (It does so within chunks of 4,000 samples, which costs more still.)
    """
    n_open = -(-int(mix.lengths.sum()) // mix.capacity) + 20
    packs: Packs = [[] for _ in range(n_open)]
    loads = [(0, pack) for pack in range(n_open)]
    for row in np.argsort(-mix.lengths, kind="stable").tolist():
        length = int(mix.lengths[row])
        load, pack = loads[0]
        if load + length > mix.capacity:
            packs.append([row])
            heapq.heappush(loads, (length, len(packs) - 1))
        else:
            packs[pack].append(row)
            heapq.heapreplace(loads, (load + length, pack))
    return [pack for pack in packs if pack]


def next_fit(mix: Mix) -> Packs:
    """Samples in their order, only the last pack is open (streaming loaders)."""
    packs: Packs = []
    room = 0
    for row, length in enumerate(mix.lengths.tolist()):
        if length > room:
            packs.append([])
            room = mix.capacity
        packs[-1].append(row)
        room -= length
    return packs


def best_fit(mix: Mix) -> Packs:
    """Textbook best fit decreasing: each sample, longest first, into the pack that it fills best."""
    packs: Packs = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), ascending
    for row in np.argsort(-mix.lengths, kind="stable").tolist():
        length = int(mix.lengths[row])
        found = bisect.bisect_left(rooms, (length, 0))
        if found == len(rooms):
            packs.append([])
            room, pack = mix.capacity, len(packs) - 1
        else:
            room, pack = rooms.pop(found)
        packs[pack].append(row)
        bisect.insort(rooms, (room - length, pack))
    return packs


def even_steps(mix: Mix, packs: Packs, per_rank: int, share: Callable[..., Any]) -> tuple[float, float]:
    """Percentage of even steps, and the 95th percentile of a step's costliest rank over the mean."""
    squares = np.array([(mix.lengths[pack] ** 2).sum() for pack in packs])
    patches = PATCHES_PER_TILE * np.array([mix.tiles[pack].sum() for pack in packs])
    costs = pack_costs(squares, patches, patch_cost(preset("eagle2.5-8b").complete()))
    steps = _steps(packs, per_rank)
    loads = [[costs[step[own]].sum() for own in share(costs[step], RANKS)] for step in steps]
    worst = np.max(loads, 1) / np.mean(loads, 1)
    return 100 * float((worst <= 1.05).mean()), float(np.quantile(worst, 0.95))


def in_turn(costs: np.ndarray, size: int) -> list[np.ndarray]:
    """Packs to ranks without looking at their costs."""
    return [np.arange(rank, len(costs), size) for rank in range(size)]


def short_share(mix: Mix, packs: Packs) -> str:
    """Percentage of short samples: 5th to 95th percentile of the steps of one pack per rank."""
    short = mix.lengths < mix.capacity // 16
    n_short = np.array([short[pack].sum() for pack in packs])
    n = np.array([len(pack) for pack in packs])
    shares = [100 * n_short[step].sum() / n[step].sum() for step in _steps(packs, 1)]
    return "{:.0f} to {:.0f} of {:.0f}".format(*np.quantile(shares, [0.05, 0.95]), 100 * short.mean())


def _steps(packs: Packs, per_rank: int) -> np.ndarray:
    order = np.random.default_rng(0).permutation(len(packs))
    size = RANKS * per_rank
    return order[: len(order) // size * size].reshape(-1, size)


def run(large: bool = False) -> Report:
    """Measure every contestant at every size."""
    rows = []
    sizes = ((short_mix, (200, 2_000, 20_000, 200_000, 1_000_000)), (long_mix, (1_000, 10_000)))
    for make, counts in sizes:
        for count in counts:
            mix = make(count)
            progress(f"{count:,} samples of the {mix.name} mix")
            contestants: dict[str, Callable[[], object]] = {
                "ours": partial(pack_rows, mix.lengths, mix.capacity, 0, tiles=mix.tiles)
            }
            peers = {"best fit": best_fit, "least loaded": least_loaded, "next fit": next_fit}
            if count <= PEERS_LIMIT:
                contestants |= {name: partial(f, mix) for name, f in peers.items()}
            seconds = interleaved(contestants, repeats=3)
            for name in contestants:
                packs = ours(mix) if name == "ours" else peers[name](mix)
                rows.append(_row(mix, name, packs, seconds[name], seconds["ours"]))
    if large:
        rows.append(_ten_million())
    return Report(
        "packs of 32,768 (short mix) and 131,072 tokens (long mix); median of 3", rows, "--large" * large
    )


def _row(mix: Mix, name: str, packs: Packs, seconds: float, ours_seconds: float) -> dict[str, Any]:
    row = {
        "mix": mix.name,
        "samples": len(mix.lengths),
        "packer": name,
        "packs": len(packs),
        "fill %": round(100 * int(mix.lengths.sum()) / (len(packs) * mix.capacity), 3),
        "CPU s": seconds,
        "x ours": seconds / ours_seconds,
        **dict.fromkeys((*BALANCE, "peak MB"), "-"),
    }
    share = assign if name == "ours" else in_turn
    if len(mix.lengths) <= BALANCE_LIMIT and len(packs) >= 2 * RANKS:
        row |= dict(zip(BALANCE, even_steps(mix, packs, 1, share), strict=False))
        row[BALANCE[3]] = short_share(mix, packs)
        if len(packs) >= 16 * RANKS:
            row[BALANCE[2]] = even_steps(mix, packs, 8, share)[0]
    return row


def _ten_million() -> dict[str, Any]:
    """Ours alone at ten million, in a process of its own, so that its memory can be told."""
    progress("10,000,000 samples of the short mix")
    code = "from benchmarks.packing import measure_memory; measure_memory(10_000_000)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=REPO / "tools", env={"PYTHONPATH": f"{REPO}"}, capture_output=True, text=True, check=True
    )
    packs, fill, seconds, megabytes = map(float, done.stdout.split())
    return {
        "mix": "short",
        "samples": 10_000_000,
        "packer": "ours",
        "packs": int(packs),
        "fill %": round(fill, 3),
        "CPU s": seconds,
        "x ours": 1.0,
        **dict.fromkeys(BALANCE, "-"),
        "peak MB": megabytes,
    }


def measure_memory(count: int) -> None:
    """Print packs, fill in %, CPU seconds and the peak memory of this process in MB, lengths included."""
    mix = short_mix(count)
    before = resource.getrusage(resource.RUSAGE_SELF)
    packing = pack_rows(mix.lengths, mix.capacity, 0, tiles=mix.tiles)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    fill = 100 * int(mix.lengths.sum()) / (len(packing) * mix.capacity)
    print(len(packing), fill, seconds, after.ru_maxrss / 1024)

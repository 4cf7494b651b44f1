"""Packing: fill and CPU time of ours beside textbook peers, from 2,000 to 200,000 samples.

The mix: 25 % text, 50 % pictures of 1 to 13 tiles, 25 % videos of 8 to 24 frames, 256 tokens each,
into packs of 32,768.
"""

import numpy as np
from benchmarks.report import Report, interleaved, progress

from megatron_eagle.data.packing import pack_rows

CAPACITY = 32768
NAIVE_LIMIT = 20_000  # first fit looks through all open packs: quadratic


def mixed_lengths(count: int) -> np.ndarray:
    """Token counts of `count` samples of the mix, seeded."""
    generator = np.random.default_rng(0)
    kind = generator.choice(3, count, p=[0.25, 0.5, 0.25])
    text = generator.integers(50, 1500, count)
    tiles = np.choose(kind, [0, generator.integers(1, 14, count), generator.integers(8, 25, count)])
    return text + 256 * tiles


def next_fit(lengths: np.ndarray) -> int:
    """Packs when samples come in their order and only the last pack is open (streaming loaders)."""
    packs, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            packs, room = packs + 1, CAPACITY
        room -= length
    return packs


def first_fit_decreasing(lengths: np.ndarray) -> int:
    """Packs when each sample, longest first, goes into the first pack with room."""
    rooms = np.full(len(lengths), CAPACITY)
    for length in np.sort(lengths)[::-1]:
        rooms[np.argmax(rooms >= length)] -= length
    return int((rooms < CAPACITY).sum())


def run() -> Report:
    """Measure every contestant at every size."""
    rows = []
    for count in (2_000, 20_000, 200_000):
        progress(f"{count:,} samples")
        lengths = mixed_lengths(count)
        contestants = {
            "ours": lambda lengths=lengths: len(pack_rows(lengths, CAPACITY, seed=0)),
            "next fit": lambda lengths=lengths: next_fit(lengths),
        }
        if count <= NAIVE_LIMIT:
            contestants["first fit decreasing"] = lambda lengths=lengths: first_fit_decreasing(lengths)
        seconds = interleaved(contestants, repeats=3)
        for name, function in contestants.items():
            packs = function()
            rows.append(
                {
                    "samples": count,
                    "packer": name,
                    "packs": packs,
                    "fill %": round(100 * int(lengths.sum()) / (packs * CAPACITY), 3),
                    "CPU s": seconds[name],
                    "x ours": seconds[name] / seconds["ours"],
                }
            )
    return Report("packs of 32,768 tokens; text, picture and video mix; median of 3", rows)

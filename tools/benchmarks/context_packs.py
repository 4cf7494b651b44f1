"""Packs for the benchmarks of context parallelism: five made-up kinds, a mix of samples, those of a store."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchmarks.packing import PATCHES_PER_TILE, long_mix, ours
from benchmarks.report import progress

from megatron_eagle.data.packing.index import read_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.planning.planner import sample_bounds

SEEDS = 4
REAL_PACKS = 256  # of a pack index, evenly spread
MIX_SAMPLES = 3000


@dataclass(frozen=True)
class Packs:
    """Packs of one length, in the order in which they are trained on."""

    name: str
    length: int
    bounds: Sequence[Sequence[int]]  # of each pack's documents, padding among them
    patches: np.ndarray  # of each pack's tiles

    @property
    def sum_squares(self) -> np.ndarray:
        """Squared document lengths of each pack, summed."""
        return np.array([(np.diff(bounds).astype(float) ** 2).sum() for bounds in self.bounds])


def made_up_packs(length: int) -> dict[str, Sequence[Sequence[int]]]:
    """Document bounds of the five kinds of packs, several of each kind that is random."""
    kinds: dict[str, Callable[[random.Random], float]] = {
        "lognormal mean 8K": lambda r: r.lognormvariate(math.log(8000) - 0.72, 1.2),
        "video mix": lambda r: r.uniform(300, 4000) if r.random() < 0.7 else r.uniform(16000, 64000),
        "chat 200-2000": lambda r: r.uniform(200, 2000),
    }
    packs: dict[str, Sequence[Sequence[int]]] = {
        "one document": [[0, length]],
        "3/4 + 1/4": [[0, length * 3 // 4, length]],
    }
    for name, draw in kinds.items():
        members = []
        for seed in range(SEEDS):
            generator, bounds = random.Random(seed), [0]
            while bounds[-1] < length:
                bounds.append(min(length, bounds[-1] + max(32, int(draw(generator)))))
            members.append(bounds)
        packs[name] = members
    return packs


def mixed_packs() -> Packs:
    """The long mix of `bench.py packing`, packed as a store is, in a random order."""
    mix = long_mix(MIX_SAMPLES)
    packed = ours(mix)
    order = np.random.default_rng(0).permutation(len(packed))
    bounds, patches = [], []
    for number in order.tolist():
        ends = mix.lengths[packed[number]].cumsum().tolist()
        bounds.append([0, *ends] if ends[-1] == mix.capacity else [0, *ends, mix.capacity])
        patches.append(int(mix.tiles[packed[number]].sum()) * PATCHES_PER_TILE)
    return Packs("long mix", mix.capacity, bounds, np.array(patches))


def store_packs(folder: str) -> Packs:
    """Packs of `folder`, a store's D/<length>.

    Raises:
        UserError: no such store or no pack index.
    """
    path = Path(folder)
    if not path.name.isdigit():
        raise UserError(f"{folder}: name a length of a store, such as D/131072")
    length = int(path.name)
    store = SampleStore(path.parent, length)
    packs = read_packs(store)
    bounds = sample_bounds(store.column("n_tokens").to_numpy(), packs, length, REAL_PACKS)
    numbers = np.linspace(0, len(packs) - 1, len(bounds)).astype(int)
    progress(f"{len(bounds)} of {len(packs)} packs of {path}")
    return Packs(str(path), length, bounds, packs.column("n_tiles", numbers) * PATCHES_PER_TILE)


def join_bounds(members: Sequence[Sequence[int]], length: int) -> list[int]:
    """Document bounds of packs laid end to end."""
    ends = [place * length + end for place, bounds in enumerate(members) for end in bounds[1:]]
    return [0, *ends]

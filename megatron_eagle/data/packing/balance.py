"""Sharing the packs of a global batch among groups of ranks so that they finish together.

Every pack costs the same in the layers that see tokens one by one, padding or not.  What differs is
attention, which grows with the square of each document's length, and the vision encoder, which grows with the
patches.

A microbatch is one pack, or several that their ranks share as one sequence (`data.packs_per_sequence`).
"""

import heapq

import numpy as np


def pack_costs(sum_squares: np.ndarray, n_patches: np.ndarray, patch_cost: float) -> np.ndarray:
    """What each pack costs, in units of squared document length: attention + vision.

    Args:
        sum_squares: of each pack, over its documents: their squared lengths in tokens.
        n_patches: of each pack.
        patch_cost: of a patch, in that unit (`model.flops.patch_cost`).
    """
    return sum_squares.astype(np.float64) + patch_cost * n_patches


def assign(costs: np.ndarray, size: int) -> list[np.ndarray]:
    """Split packs among `size` ranks, equally many each, so that the costliest rank costs little.

    Goes from the costliest pack to the cheapest, each to the rank that has the least so far and still takes
    one.  A pure function of its arguments.

    Args:
        costs: of the packs, a multiple of `size` of them.

    Returns:
        Per rank the ascending positions of its packs in `costs`.
    """
    per_rank = len(costs) // size
    positions: list[list[int]] = [[] for _ in range(size)]
    taking = [(0.0, rank) for rank in range(size)]  # a heap: load so far and rank
    for position in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(taking)
        positions[rank].append(position)
        if len(positions[rank]) < per_rank:
            heapq.heappush(taking, (load + costs[position], rank))
    return [np.sort(np.array(mine, np.int64)) for mine in positions]


def deal(costs: np.ndarray, size: int, packs_per_sequence: int = 1) -> list[list[np.ndarray]]:
    """Split packs among `size` groups of ranks, `packs_per_sequence` to each microbatch.

    First packs are put together so that microbatches cost about the same, then these are shared; both as
    `assign`. A pure function of its arguments.

    Args:
        costs: of the packs, a multiple of `size * packs_per_sequence` of them.

    Returns:
        Per group its microbatches, in the order of their first packs: the ascending positions of their packs
        in `costs`.
    """
    together = assign(costs, len(costs) // packs_per_sequence)
    sequences = sorted(together, key=lambda positions: int(positions[0]))
    own = assign(np.array([costs[positions].sum() for positions in sequences]), size)
    return [[sequences[number] for number in numbers] for numbers in own]

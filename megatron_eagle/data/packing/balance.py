"""Sharing the packs of a global batch among data-parallel ranks so that they finish together.

Every pack costs the same in the layers that see tokens one by one, padding or not.  What differs is
attention, which grows with the square of each document's length, and the vision encoder, which grows with the
patches.
"""

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
    loads = [0.0] * size
    for position in np.argsort(-costs, kind="stable").tolist():
        rank = min((r for r in range(size) if len(positions[r]) < per_rank), key=loads.__getitem__)
        positions[rank].append(position)
        loads[rank] += costs[position]
    return [np.sort(np.array(mine, np.int64)) for mine in positions]

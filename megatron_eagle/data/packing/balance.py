"""Sharing the packs of a global batch among data-parallel ranks so that they finish together.

Every pack costs the same in the layers that see tokens one by one, padding or not.  What differs is
attention, which grows with the square of each document's length, and the vision encoder, which grows with the
patches.
"""

import numpy as np

# Forward FLOPs of one patch in the vision encoder and connector over those of one unit of squared document
# length in the language model's causal attention, for the sizes of EAGLE 2.5 8B.  Per patch: 27 layers x
# 2 x (4 x 1152^2 + 2 x 1152 x 4304 + 2 x 1024 x 1152), and the connector: 9.6e8.  Per unit: 28 layers x
# 2 x 3584 = 2e5.
PATCH_COST = 4800.0


def pack_costs(sum_squares: np.ndarray, n_patches: np.ndarray) -> np.ndarray:
    """What each pack costs, in units of squared document length: attention + vision.

    `sum_squares` are the sums of the documents' squared lengths, `n_patches` vision patches.
    """
    return sum_squares.astype(np.float64) + PATCH_COST * n_patches


def assign(costs: np.ndarray, size: int) -> list[np.ndarray]:
    """Split packs among `size` ranks, equally many each, so that the costliest rank costs little.

    Goes from the costliest pack to the cheapest, each to the rank that has the least so far and still takes
    one.  A pure function of its arguments.  Returns per rank the ascending positions of its packs in `costs`,
    whose number must be a multiple of `size`.
    """
    per_rank = len(costs) // size
    positions: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for position in np.argsort(-costs, kind="stable").tolist():
        rank = min((r for r in range(size) if len(positions[r]) < per_rank), key=loads.__getitem__)
        positions[rank].append(position)
        loads[rank] += costs[position]
    return [np.sort(np.array(mine, np.int64)) for mine in positions]

"""Grids of many pictures at once, and what a grid costs; `hf_model.grids` has the rule."""

import numpy as np

from megatron_eagle.hf_model.grids import grid_candidates


def select_grids(
    widths: np.ndarray, heights: np.ndarray, *, tile_size: int, max_tiles: int, min_tiles: int = 1
) -> np.ndarray:
    """`select_grid` for many pictures at once: int64 [n, 2] of (columns, rows), bit for bit the same.

    Args:
        widths: integers [n], whose products with `heights` are below 2^53, where a float64 is still exact.
        heights: integers [n].

    Raises:
        ValueError: an empty picture or impossible tile limits.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    if len(widths) and min(widths.min(), heights.min()) < 1:
        raise ValueError("picture sizes must be positive")
    aspects = widths / heights
    areas = widths * heights
    best = np.ones((len(widths), 2), np.int64)
    best_scores = np.full(len(widths), -np.inf)
    for columns, rows in grid_candidates(max_tiles, min_tiles):
        target = columns / rows
        coverage = (columns * rows * tile_size * tile_size) / areas
        scores = np.minimum(coverage, 0.6) * np.minimum(target / aspects, aspects / target)
        better = scores > best_scores
        best[better] = columns, rows
        best_scores[better] = scores[better]
    return best


def tile_count(grid: tuple[int, int]) -> int:
    """Tiles that a picture with this grid costs: its cells, plus the thumbnail if there is more than one."""
    cells = grid[0] * grid[1]
    return cells + (cells > 1)

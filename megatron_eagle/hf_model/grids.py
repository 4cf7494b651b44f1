"""Image Area Preservation: the grid of tiles in which a picture is cut (Eagle 2.5 paper, section 3.2).

The score is float64 arithmetic in a fixed order: exact arithmetic picks another grid for 1 to 6 % of
picture sizes, so nothing here may be simplified algebraically. Training and every export use this file.
"""

from functools import lru_cache
from typing import Any

TILINGS = ("iap", "aspect")
# Among candidates of equal area the first wins a tie, which happens for (nearly) square pictures.  The order
# is the one the released model was trained with.  It depends on the largest tile count N, in three groups;
# each entry below is the order of one area, written as the columns of its candidates (their maximum is the
# area).  Areas that are not listed, and every N outside `_LISTED` (beyond 36 the release's order is
# unknown), go by columns ascending.
_LISTED = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 18, 20, 24, 32, 36))
_UP_TO_7 = "3 1, 4 1 2, 6 2 1 3, 7 1"
_UP_TO_20 = (
    "3 1, 2 4 1, 5 1, 1 6 3 2, 7 1, 4 2 1 8, 2 5 10 1, 11 1, 12 3 4 1 6 2, 13 1, 14 2 1 7, 1 5 15 3, "
    "1 2 16 8 4, 9 1 18 3 2 6, 5 20 4 10 2 1"
)
_UP_TO_36 = (
    "3 1, 2 4 1, 5 1, 6 3 2 1, 7 1, 4 2 1 8, 9 3 1, 1 5 10 2, 6 1 2 12 3 4, 13 1, 14 1 7 2, 1 5 3 15, "
    "8 16 4 1 2, 18 3 9 1 6 2, 20 5 2 1 4 10, 7 1 3 21, 2 11 22 1, 1 24 6 3 4 2 8 12, 5 1 25, 1 2 13 26, "
    "9 27 3 1, 1 7 14 2 4 28, 29 1, 3 15 1 2 10 5 30 6, 8 1 4 32 16 2, 1 33 3 11, 34 17 2 1, 35 1 7 5, "
    "4 6 3 18 12 36 1 9 2"
)
# Limits of tiles that are tried where a picture's own has no room: the paper's from 12 down; above, every
# third or half less, where the release's order of grids is known.
_LOWER_LIMITS = (36, 24, 16, 12, 8, 6, 4, 2, 1)


def tile_limits(most: int) -> list[int]:
    """`most` tiles and the lower limits, downward."""
    return [most, *(limit for limit in _LOWER_LIMITS if limit < most)]


@lru_cache(maxsize=64)
def grid_candidates(max_tiles: int, min_tiles: int = 1) -> tuple[tuple[int, int], ...]:
    """All grids (columns, rows) of `min_tiles` to `max_tiles` tiles, by area and then in the release's order.

    Raises:
        ValueError: the two limits leave no grid.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"tile limits must satisfy 1 <= min <= max, got {min_tiles} and {max_tiles}")
    table = _UP_TO_7 if max_tiles < 8 else _UP_TO_20 if max_tiles < 24 else _UP_TO_36
    orders = [[int(c) for c in entry.split()] for entry in table.split(",")] if max_tiles in _LISTED else []
    listed = {max(order): order for order in orders}
    grids = []
    for area in range(min_tiles, max_tiles + 1):
        ascending = [c for c in range(1, area + 1) if area % c == 0]
        grids += [(c, area // c) for c in listed.get(area, ascending)]
    return tuple(grids)


@lru_cache(maxsize=65536)
def select_grid(
    width: int,
    height: int,
    *,
    tile_size: int,
    max_tiles: int,
    min_tiles: int = 1,
    tiling: str = "iap",
    drawn: bool = False,
) -> tuple[int, int]:
    """Grid (columns, rows) for a picture of `width` x `height` pixels, with tiles of `tile_size` pixels.

    Maximises `min(tiled area / picture area, 0.6) * min(ratio of the aspect ratios, its inverse)`.  With
    `tiling` "aspect", what the paper compares with: the closest aspect ratio, and of several grids with that
    ratio the last whose pixels are less than twice the picture's.

    `drawn` chooses for what will be drawn at the size of its grid, as a page is: among those grids alone that
    a picture of that very size gets, so that who has only the picture cuts it alike (5 x 5 would get 4 x 4).

    Raises:
        ValueError: an empty picture or impossible tile limits.
    """
    if width < 1 or height < 1:
        raise ValueError(f"picture size must be positive, got {width}x{height}")
    aspect = width / height
    rule: dict[str, Any] = {"max_tiles": max_tiles, "min_tiles": min_tiles, "tiling": tiling}
    best, best_score = (1, 1), float("-inf")
    for columns, rows in grid_candidates(max_tiles, min_tiles):
        target = columns / rows
        coverage = (columns * rows * tile_size * tile_size) / (width * height)
        if tiling == "aspect":
            score = -abs(aspect - target)
            better = score > best_score or (score == best_score and coverage < 2)
        else:
            score = min(coverage, 0.6) * min(target / aspect, aspect / target)
            better = score > best_score
        if better and drawn:
            size = (columns * tile_size, rows * tile_size)
            better = select_grid(*size, tile_size=tile_size, **rule) == (columns, rows)
        if better:
            best, best_score = (columns, rows), score
    return best


def has_thumbnail(grid: tuple[int, int]) -> bool:
    """Whether the whole picture follows its cells as one more tile: where there is more than one."""
    return grid[0] * grid[1] > 1


def tile_count(grid: tuple[int, int]) -> int:
    """Tiles that a picture with this grid (columns, rows) costs: its cells and the thumbnail."""
    return grid[0] * grid[1] + has_thumbnail(grid)


def kept_pixels(width: int, height: int, grid: tuple[int, int], tile_size: int) -> float:
    """Share, 0 to 1, of a picture's pixels that its cells (columns, rows) have room for; the rest is resized
    away. A side that is enlarged keeps all of it."""
    across, down = (cells * tile_size / side for cells, side in zip(grid, (width, height), strict=True))
    return min(1.0, across) * min(1.0, down)

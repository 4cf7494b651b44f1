"""Image Area Preservation against the listed cases and the examples of the specification."""

import csv
import json

import pytest

from megatron_eagle.hf_model.grids import grid_candidates, kept_pixels, select_grid, tile_count
from tests.paths import SPEC, need_spec


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (4, 3)),
        ((1920, 1080), (4, 2)),
        ((336, 336), (1, 1)),
        ((1024, 1024), (2, 2)),
        ((3000, 300), (10, 1)),
        ((2172, 2172), (3, 4)),
    ],
)
def test_worked_examples(size, grid):
    assert select_grid(*size, tile_size=448, max_tiles=12) == grid


@need_spec
def test_all_listed_cases_are_bit_exact():
    cases = list(csv.DictReader((SPEC / "iap_cases.csv").open()))
    for case in cases:
        value = {key: int(text) for key, text in case.items()}
        grid = select_grid(
            value["width"], value["height"], tile_size=value["tile"], max_tiles=value["max_tiles"]
        )
        assert grid == (value["cols"], value["rows"]), case
        assert (tile_count(grid) > grid[0] * grid[1]) == bool(value["thumbnail"])
    assert len(cases) == 120


@need_spec
def test_candidate_order_is_the_listed_one():
    for max_tiles, listed in json.loads((SPEC / "iap_candidate_order.json").read_text()).items():
        assert [list(grid) for grid in grid_candidates(int(max_tiles))] == listed


def test_beyond_36_tiles_columns_ascend():
    """What the release would do there is unknown; the choice is written down, and stays."""
    for limit in (37, 40, 48):
        grids = grid_candidates(limit)
        assert list(grids) == sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
        assert max(columns * rows for columns, rows in grids) == limit
    released = grid_candidates(36)
    assert list(released) != sorted(released, key=lambda grid: (grid[0] * grid[1], grid[0]))


@pytest.mark.parametrize(
    ("limit", "grid", "kept"), [(1, (1, 1), 2), (12, (4, 3), 29), (24, (6, 4), 58), (48, (9, 5), 100)]
)
def test_what_is_kept_of_4k(limit, grid, kept):
    assert select_grid(3840, 2160, tile_size=448, max_tiles=limit) == grid
    assert round(100 * kept_pixels(3840, 2160, grid, 448)) == kept


def test_an_enlarged_side_keeps_no_more_than_it_has():
    assert kept_pixels(448, 896, (2, 1), 448) == 0.5
    assert kept_pixels(10, 10, (1, 1), 448) == 1.0


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (4, 3)),  # of 4:3 there is one grid
        ((896, 896), (2, 2)),  # 1 x 1 has a quarter of the pixels, 3 x 3 more than twice as many
        ((500, 500), (1, 1)),  # 2 x 2 has more than three times as many
        ((3000, 300), (10, 1)),
        ((1000, 700), (3, 2)),  # IAP takes 4 x 3
    ],
)
def test_the_closest_aspect_ratio(size, grid):
    assert select_grid(*size, tile_size=448, max_tiles=12, tiling="aspect") == grid


def test_min_tiles_and_refusals():
    assert select_grid(336, 336, tile_size=448, max_tiles=12, min_tiles=4) == (2, 2)
    assert tile_count((1, 1)) == 1
    assert tile_count((3, 4)) == 13
    with pytest.raises(ValueError, match="positive"):
        select_grid(0, 5, tile_size=448, max_tiles=12)
    with pytest.raises(ValueError, match="tile limits"):
        select_grid(5, 5, tile_size=448, max_tiles=1, min_tiles=2)

"""What a grid of Image Area Preservation costs; `hf_model.grids` chooses it."""


def tile_count(grid: tuple[int, int]) -> int:
    """Tiles that a picture with this grid costs: its cells, plus the thumbnail if there is more than one."""
    cells = grid[0] * grid[1]
    return cells + (cells > 1)

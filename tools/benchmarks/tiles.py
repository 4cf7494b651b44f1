"""Cutting pictures into tiles: torch's antialiased bicubic (ours) beside Pillow's, CPU time per tile.

Photographs of three sizes are made here (smooth noise), 448-pixel tiles, at most 12, one thread.
"""

import numpy as np
import torch
from benchmarks.report import Report, interleaved, progress
from PIL import Image

from megatron_eagle.data.iap import select_grid, tile_count
from megatron_eagle.data.media.tiles import normalize, tile_image

TILE = 448


def photograph(width: int, height: int) -> Image.Image:
    """Smooth seeded noise: resizing costs the same as for a photograph."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def tile_with_pillow(image: Image.Image, grid: tuple[int, int]) -> torch.Tensor:
    """The same tiles by Pillow's bicubic filter."""
    columns, rows = grid
    whole = np.asarray(image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC))
    cut = whole.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
    tiles = [torch.from_numpy(np.ascontiguousarray(cut))]
    if columns * rows > 1:
        small = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
        tiles.append(torch.from_numpy(small.transpose(2, 0, 1).copy())[None])
    return normalize(torch.cat(tiles))


def run() -> Report:
    """Measure both on every picture."""
    torch.set_num_threads(1)
    rows = []
    for width, height in ((640, 480), (1920, 1080), (4032, 3024)):
        progress(f"{width} x {height}")
        image = photograph(width, height)
        grid = select_grid(width, height, tile_size=TILE, max_tiles=12)
        contestants = {
            "torch": lambda image=image, grid=grid: tile_image(image, grid, TILE),
            "Pillow": lambda image=image, grid=grid: tile_with_pillow(image, grid),
        }
        seconds = interleaved(contestants)
        apart = (contestants["torch"]() - contestants["Pillow"]()).abs().mean().item() * 127.5
        for name in contestants:
            rows.append(
                {
                    "picture": f"{width}x{height}",
                    "tiles": tile_count(grid),
                    "resizer": name,
                    "CPU ms per tile": 1000 * seconds[name] / tile_count(grid),
                    "x torch": seconds[name] / seconds["torch"],
                    "mean difference of 255": apart,
                }
            )
    return Report("448-pixel tiles, at most 12, one thread; median of 5", rows)

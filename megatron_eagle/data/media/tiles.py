"""Pixels as the vision encoder takes them: square tiles in [-1, 1].

Shapes: n tiles, S tile size in pixels.
"""

import numpy as np
import torch
from PIL import Image

from megatron_eagle.hf_model.tiles import cut_tiles, resize


def tile_image(image: Image.Image, grid: tuple[int, int], tile_size: int) -> torch.Tensor:
    """`image_tiles` as float32 [n, 3, S, S] in [-1, 1]."""
    return normalize(image_tiles(image, grid, tile_size))


def image_tiles(image: Image.Image, grid: tuple[int, int], tile_size: int) -> torch.Tensor:
    """Cut a picture into its grid (columns, rows) of tiles, row by row; several are followed by a thumbnail.

    Returns uint8 [n, 3, S, S].
    """
    columns, rows = grid
    pixels = np.array(image)
    whole = resize(pixels, columns * tile_size, rows * tile_size)
    thumbnail = resize(pixels, tile_size, tile_size) if columns * rows > 1 else None
    return cut_tiles(whole, thumbnail, grid)


def normalize(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]: (x / 255 - 0.5) / 0.5, the same bits on every device."""
    white = torch.full((), 255.0, device=tiles.device)  # a number would be multiplied by its inverse on a GPU
    return tiles.to(torch.float32).div_(white).sub_(0.5).div_(0.5)

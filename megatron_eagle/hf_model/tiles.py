"""Pixels to square tiles in [-1, 1], in training and in every export.

Shapes: n tiles, S tile size in pixels, h and w a picture's height and width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .grids import has_thumbnail

# What every Eagle 2.5 was trained with.
RESCALE_FACTOR, MEAN, STD = 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def image_tiles(
    pixels: np.ndarray, grid: tuple[int, int], tile_size: int, *, use_thumbnail: bool = True
) -> torch.Tensor:
    """Cut a picture into its grid (columns, rows) of tiles, row by row; several are followed by a thumbnail.

    Args:
        pixels: uint8 [h, w, 3].
        use_thumbnail: False leaves it out.

    Returns:
        uint8 [n, 3, S, S]
    """
    whole = resize(pixels, grid[0] * tile_size, grid[1] * tile_size)
    wanted = use_thumbnail and has_thumbnail(grid)
    return cut_tiles(whole, resize(pixels, tile_size, tile_size) if wanted else None, grid)


def resize(pixels: np.ndarray, width: int, height: int) -> torch.Tensor:
    """Bicubic, antialiased: uint8 [h, w, 3] -> uint8 [3, height, width]; the aspect ratio is not kept."""
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(source, size=(height, width), mode="bicubic", antialias=True)
    return resized[0].contiguous()


def cut_tiles(whole: torch.Tensor, thumbnail: "torch.Tensor | None", grid: tuple[int, int]) -> torch.Tensor:
    """The tiles of a picture, row by row, and its thumbnail, if any, as the last one.

    Args:
        whole: the picture at the size of its grid, [3, rows * S, columns * S].
        thumbnail: [3, S, S].
        grid: columns, rows.

    Returns:
        [n, 3, S, S]
    """
    columns, rows = grid
    size = whole.shape[1] // rows
    tiles = whole.reshape(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
    return tiles if thumbnail is None else torch.cat([tiles, thumbnail[None]])


def normalize(
    tiles: torch.Tensor,
    rescale_factor: float = RESCALE_FACTOR,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> torch.Tensor:
    """`(x * rescale_factor - mean) / std` of uint8 [n, 3, S, S] in fp32, the same bits on every device.

    With the defaults the values are in [-1, 1].
    """
    # Dividing by 255 and multiplying by 1/255 differ in the last bit, so what is a whole number divides.
    divisor = 1 / rescale_factor
    divisor = round(divisor) if abs(divisor - round(divisor)) < 1e-6 else divisor
    # Divisors are tensors: a GPU would multiply by the inverse of a number.
    scaled = tiles.to(torch.float32).div_(_filled([divisor], tiles.device))
    return scaled.sub_(_filled(mean, tiles.device)).div_(_filled(std, tiles.device))


def _filled(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """fp32 [values, 1, 1], filled where it is: for a copy from the host a GPU would be waited for."""
    parts = [torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values]
    return torch.stack(parts)

"""Pixels to square tiles, in training and in every export.

Shapes: n tiles, S tile size in pixels, h and w a picture's height and width.
"""

import numpy as np
import torch


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

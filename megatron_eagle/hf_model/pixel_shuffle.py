"""Patches to image tokens, in training and in every export."""

import torch


def pixel_shuffle(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Fold each factor x factor square of patches into one token: [n, p, h] -> [n, p / factor^2, h factor^2].

    Patches and tokens are row-major; inside a token the order is row of the square, column, feature.

    Raises:
        ValueError: the patches are no square, or no whole number of them.
    """
    n, p, h = features.shape
    side = round(p**0.5)
    if side * side != p or side % factor:
        raise ValueError(f"pixel shuffle needs a square grid divisible by {factor}, got {p} patches")
    grid = features.reshape(n, side // factor, factor, side // factor, factor, h)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(n, p // factor**2, h * factor**2)

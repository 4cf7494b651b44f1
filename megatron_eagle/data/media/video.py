"""Frames of a video as the model sees them: one tile each, resized as soon as it is decoded.

Shapes: n frames, S tile size in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_eagle.data.media.exact import read_frames, upright
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.source import check_unchanged
from megatron_eagle.data.media.tiles import normalize, resize
from megatron_eagle.errors import UserError

BACKENDS = ("auto", "exact")


def decode_frames(
    source: str,
    index: FrameIndex,
    frame_numbers: Sequence[int],
    *,
    size: int,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the frames with these numbers, in any order, repetitions included.

    `index` is that of the file (`read_frame_table(source).index`) or what a store kept of it
    (`VideoPlan.index`).  Returns tiles uint8 [n, 3, S, S] with S = `size` on `device`, and their times
    float64 [n] in seconds of the file's own clock.  A frame is resized to a square (`tiles.resize`) before
    the next one is decoded.

    Raises `Problem` for a number that the index does not have, a file that is not the one that was indexed,
    and a frame that does not decode whole; `UserError` for an unknown back end.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend}")
    chosen = index.select(frame_numbers)
    check_unchanged(source, index.file, index.fingerprint)
    order = torch.from_numpy(np.searchsorted(chosen.numbers, frame_numbers))
    tiles = torch.empty(len(chosen.numbers), 3, size, size, dtype=torch.uint8)
    for i, frame in enumerate(read_frames(source, chosen)):
        tiles[i] = resize(upright(frame, index.rotation), size, size)
    if len(order) > len(tiles) or (order.diff() < 0).any():
        tiles = tiles[order]
    return tiles.to(device), torch.from_numpy(chosen.times)[order]


def load_frames(
    source: str, index: FrameIndex, frame_numbers: Sequence[int], *, tile_size: int
) -> torch.Tensor:
    """The same tiles as float32 [n, 3, S, S] in [-1, 1]."""
    tiles, _ = decode_frames(source, index, frame_numbers, size=tile_size)
    return normalize(tiles)

"""Frames of a video as the model sees them: one tile each, resized as soon as it is decoded."""

from collections.abc import Sequence

import torch

from megatron_eagle.data.media.exact import decode_frames, upright
from megatron_eagle.data.media.tiles import normalize, resize


def load_frames(
    path: str, pts: Sequence[int], seek_points: Sequence[int], *, rotation: int, tile_size: int
) -> torch.Tensor:
    """The frames with these ascending presentation times as float32 [n, 3, S, S] in [-1, 1].

    No more than one full-size frame is held at a time.  Raises `Problem` (see `exact.decode_frames`).
    """
    tiles = torch.empty(len(pts), 3, tile_size, tile_size, dtype=torch.uint8)
    for i, frame in enumerate(decode_frames(path, pts, seek_points)):
        tiles[i] = resize(upright(frame, rotation), tile_size, tile_size)
    return normalize(tiles)

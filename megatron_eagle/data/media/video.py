"""Frames of a video as the model sees them: one tile each, resized as soon as it is decoded.

Shapes: n frames, S tile size in pixels.
"""

from collections.abc import Sequence

import torch

from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.hf_model.tiles import normalize


def decode_frames(
    source: str,
    index: FrameIndex,
    frame_numbers: Sequence[int],
    *,
    size: int,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode the frames with these numbers: `MediaDecoder.frames`, for one video.

    Returns tiles uint8 [n, 3, S, S] with S = `size` on `device`, and their times float64 [n] in seconds of
    the file's own clock.  `backend` is auto, exact or dali.

    Raises:
        Problem: a number that the index does not have, a file that is not the one that was indexed, and a
            frame that does not decode whole; `UserError` for a back end that there is not.
    """
    decoder = MediaDecoder(backend, tile_size=size, device=device)
    try:
        tiles, times = decoder.frames(source, index, frame_numbers)
    finally:
        decoder.close()
    return tiles.to(device), times


def load_frames(
    source: str, index: FrameIndex, frame_numbers: Sequence[int], *, tile_size: int
) -> torch.Tensor:
    """The same tiles as float32 [n, 3, S, S] in [-1, 1]."""
    tiles, _ = decode_frames(source, index, frame_numbers, size=tile_size)
    return normalize(tiles)

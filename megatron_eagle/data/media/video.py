"""Frames of a video as the model sees them: one tile each, resized as soon as it is decoded.

Shapes: n frames, S tile size in pixels.
"""

from collections.abc import Sequence

import torch

from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.frame_table import FrameIndex


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

    Args:
        size: S, pixels a side of a tile.
        device: where the tiles end up.
        backend: auto, exact or dali.

    Returns:
        Tiles uint8 [n, 3, S, S] on `device`, and their times float64 [n] in seconds of the file's own clock.

    Raises:
        Problem: the index does not have a number, the file is not the one that was indexed, or a frame does
            not decode whole.
        UserError: there is no such back end.
    """
    decoder = MediaDecoder(backend, tile_size=size, device=device)
    try:
        tiles, times = decoder.frames(source, index, frame_numbers)
    finally:
        decoder.close()
    return tiles.to(device), times

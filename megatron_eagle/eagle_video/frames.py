"""Frames of a video at a fixed rate: what is on screen at each time, decoded exactly and in one pass."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil

import numpy as np

from megatron_eagle.data.media.exact import read_frames, upright
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.data.sampling.probe import VideoMetadata, probe_video


def open_section(source: VideoSource) -> tuple[VideoMetadata, Fraction]:
    """Probe a video or a section of it.

    Returns its metadata and where it begins, in seconds of the file's clock.

    Raises:
        Problem: the video cannot be read.
    """
    metadata = probe_video(source)
    begin = int(metadata.table.pts[0]) * metadata.table.time_base
    return metadata, begin if source.start is None else source.start


def sample_times(start: Fraction, end: Fraction, fps: float, max_frames: int | None = None) -> list[Fraction]:
    """Times in [start, end): the middles of equal pieces, `fps` a second, from 1 to `max_frames` of them.

    `fps` is an upper bound: a section that would take more than `max_frames` is sampled evenly.
    """
    n = max(1, ceil((end - start) * Fraction(str(fps)) - Fraction(1, 2)))
    n = n if max_frames is None else min(n, max_frames)
    return [start + (end - start) * Fraction(2 * i + 1, 2 * n) for i in range(n)]


def frames_at(metadata: VideoMetadata, times: Sequence[Fraction]) -> Iterator[np.ndarray]:
    """The frame on screen at each of these ascending times, uint8 [h, w, 3], one at a time.

    A frame that is on screen at two of the times is decoded once and given twice.

    Raises:
        Problem: a frame cannot be decoded.
    """
    table = metadata.table
    # Frames with pts <= t; an integer is at most a rational exactly if it is at most its floor.
    ticks = [t // table.time_base for t in times]
    numbers = np.clip(np.searchsorted(table.pts, ticks, side="right") - 1, metadata.first, metadata.last)
    unique, repeats = np.unique(numbers, return_counts=True)
    decoded = read_frames(metadata.file.path, table.index.select(unique))
    for frame, count in zip(decoded, repeats, strict=True):
        picture = upright(frame, table.rotation)
        for _ in range(count):
            yield picture

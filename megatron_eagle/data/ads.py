"""Automatic Degradation Sampling: which frames and which tile grids a sample gets (Eagle 2.5 paper, Eq. 2).

All text is kept.  Visual tokens are maximised subject to the token limit, time before space: first frames are
handed out with one tile per picture, then the largest tile limit that still fits is given to all pictures.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_eagle.data.iap import select_grid, tile_count
from megatron_eagle.data.ledger import Problem

TILE_LIMITS = (12, 8, 6, 4, 2, 1)
Count = Callable[[Sequence[int], Sequence[Sequence[int]]], int]
"""Exact token count of the finished sample, given the tiles of each image and the frames of each video."""


@dataclass(frozen=True)
class SamplingSettings:
    """How much of the media is wanted: frames per second, frames per video, tiles per picture."""

    fps: float = 2.0
    min_frames: int = 8
    max_frames: int = 512
    max_tiles: int = 12
    tile_size: int = 448

    def __post_init__(self):
        if self.fps <= 0 or min(self.min_frames, self.max_frames, self.max_tiles, self.tile_size) < 1:
            raise ValueError(f"fps, frames, tiles and the tile size must be positive: {self}")


@dataclass(frozen=True)
class ImageWish:
    """A picture's size in pixels and the tile limit of its own."""

    width: int
    height: int
    max_tiles: int


@dataclass(frozen=True)
class VideoWish:
    """A clip: its first and last frame number in the file, the frames it wants and those it must have."""

    first: int
    last: int
    wanted: int
    minimum: int

    def frames(self, n: int) -> tuple[int, ...]:
        """`n` frame numbers spread evenly over the clip, its first and last included."""
        return tuple(np.linspace(self.first, self.last, n).round().astype(np.int64).tolist())


@dataclass(frozen=True)
class Plan:
    """What was decided: grid (columns, rows) per image, frame numbers per video, and the resulting length.

    `tiles_wanted` is what the images would have got without a token limit.
    """

    grids: tuple[tuple[int, int], ...]
    frames: tuple[tuple[int, ...], ...]
    n_tokens: int
    tiles_wanted: int


def wanted_frames(available: int, duration: Fraction, settings: SamplingSettings) -> int:
    """Frames wanted of a clip of `available` frames and `duration` seconds: fps x duration, within limits."""
    by_time = math.floor(Fraction(str(settings.fps)) * duration)
    return min(available, settings.max_frames, max(settings.min_frames, by_time))


def sample_media(
    images: Sequence[ImageWish],
    videos: Sequence[VideoWish],
    count: Count,
    limit: int,
    settings: SamplingSettings,
) -> Plan:
    """Fit a sample into `limit` tokens.

    Raises `Problem` if it does not fit with one tile per image and the minimum of frames per video.
    """
    single = [1] * len(images)
    n = _give_frames(videos, lambda n: count(single, _frames(videos, n)), limit)
    frames = _frames(videos, n)
    for tile_limit in sorted({settings.max_tiles, *(t for t in TILE_LIMITS if t < settings.max_tiles)})[::-1]:
        grids = _grids(images, tile_limit, settings.tile_size)
        n_tokens = count([tile_count(grid) for grid in grids], frames)
        if n_tokens <= limit:
            break
    wanted = sum(tile_count(grid) for grid in _grids(images, settings.max_tiles, settings.tile_size))
    return Plan(grids, frames, n_tokens, wanted)


def _give_frames(videos: Sequence[VideoWish], count: Callable[[list[int]], int], limit: int) -> list[int]:
    """Frames per video: one more for the relatively emptiest video, until one more does not fit."""
    start = [min(video.minimum, video.wanted) for video in videos]
    least = count(start)
    if least > limit:
        raise Problem("too long", f"needs at least {least} tokens, the limit is {limit}")
    order = _giving_order(videos, start)

    def after(steps: int) -> list[int]:
        return [n + order[:steps].count(i) for i, n in enumerate(start)]

    def fits(steps: int) -> bool:
        return count(after(steps)) <= limit

    if fits(len(order)):
        return after(len(order))
    # A frame costs far more than the others' labels may change by, so the first step that does not fit is
    # found by halving; a few steps before it are tried all the same, for tiles of very few tokens.
    first = bisect.bisect_left(range(1, len(order)), True, key=lambda steps: not fits(steps)) + 1
    near = range(max(1, first - 4), first)
    return after(next((steps for steps in near if not fits(steps)), first) - 1)


def _giving_order(videos: Sequence[VideoWish], start: Sequence[int]) -> list[int]:
    """Which video each further frame goes to: the one with the smallest share of its wish, or the first."""
    heap = [(Fraction(n, v.wanted), i, n) for i, (v, n) in enumerate(zip(videos, start, strict=True))]
    heapq.heapify(heap)
    order = []
    while heap:
        share, i, n = heapq.heappop(heap)
        if share < 1:
            order.append(i)
            heapq.heappush(heap, (Fraction(n + 1, videos[i].wanted), i, n + 1))
    return order


def _frames(videos: Sequence[VideoWish], n: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(video.frames(k) for video, k in zip(videos, n, strict=True))


def _grids(images: Sequence[ImageWish], tile_limit: int, tile_size: int) -> tuple[tuple[int, int], ...]:
    return tuple(
        select_grid(
            image.width, image.height, tile_size=tile_size, max_tiles=min(tile_limit, image.max_tiles)
        )
        for image in images
    )

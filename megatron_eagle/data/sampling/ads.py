"""Automatic Degradation Sampling: which frames and which tile grids a sample gets (Eagle 2.5 paper, Eq. 2).

All text is kept.  Visual tokens are maximised subject to the token limit, time before space: first frames are
handed out with one tile per picture, then the largest tile limit that still fits is given to all pictures.  A
document's pages are pictures; where not all fit it gives up pages before anything else.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from megatron_eagle.hf_model.clips import choose_frames, spread
from megatron_eagle.hf_model.grids import TILINGS, select_grid, tile_count, tile_limits
from megatron_eagle.problems import Problem

Count = Callable[[Sequence[int], Sequence[Sequence[int]], Sequence[Sequence[int]]], int]
"""Exact token count of the finished sample, given the tiles of each image, the frames of each video and the
tiles of each shown page of each document."""


@dataclass(frozen=True)
class SamplingSettings:
    """How much of the media is wanted: frames per second, frames per video, tiles per picture; `tiling` is
    the rule of `grids.select_grid`."""

    fps: float = 2.0
    min_frames: int = 8
    max_frames: int = 512
    max_tiles: int = 12
    tile_size: int = 448
    tiling: str = "iap"

    def __post_init__(self) -> None:
        if self.tiling not in TILINGS:
            raise ValueError(f"tiling must be one of {', '.join(TILINGS)}, not {self.tiling}")
        if self.fps <= 0 or min(self.min_frames, self.max_frames, self.max_tiles, self.tile_size) < 1:
            raise ValueError(f"fps, frames, tiles and the tile size must be positive: {self}")


@dataclass(frozen=True)
class ImageDemand:
    """A picture's size in pixels and the tile limit of its own; `drawn` if it will be drawn at the size of
    its grid, as a page is."""

    width: int
    height: int
    max_tiles: int
    drawn: bool = False


@dataclass(frozen=True)
class VideoDemand:
    """A clip: its first and last frame number in the file, the frames it wants and those it must have.

    `times` are those of its frames, in any unit, if their rate varies.
    """

    first: int
    last: int
    wanted: int
    minimum: int
    times: np.ndarray | None = field(default=None, compare=False)

    def frames(self, n: int) -> tuple[int, ...]:
        """`n` frame numbers spread evenly over the clip, its first and last included."""
        return choose_frames(self.first, self.last, n, self.times)


Grid = tuple[int, int]


@dataclass(frozen=True)
class MediaPlan:
    """What was decided.

    Attributes:
        grids: (columns, rows) of each image.
        frames: their numbers, for each video.
        pages: for each document the numbers of those shown, from 0.
        page_grids: their grids.
        n_tokens: the resulting length.
        tile_limit: the t that all pictures got.
        tiles_wanted: what images and pages would have got without a token limit.
    """

    grids: tuple[Grid, ...]
    frames: tuple[tuple[int, ...], ...]
    pages: tuple[tuple[int, ...], ...]
    page_grids: tuple[tuple[Grid, ...], ...]
    n_tokens: int
    tile_limit: int
    tiles_wanted: int


def wanted_frames(available: int, duration: Fraction, settings: SamplingSettings) -> int:
    """Frames wanted of a clip of `available` frames and `duration` seconds: fps x duration, within limits."""
    by_time = math.floor(Fraction(str(settings.fps)) * duration)
    return min(available, settings.max_frames, max(settings.min_frames, by_time))


def plan_media(
    images: Sequence[ImageDemand],
    videos: Sequence[VideoDemand],
    count: Count,
    limit: int,
    settings: SamplingSettings,
    documents: Sequence[Sequence[ImageDemand]] = (),
) -> MediaPlan:
    """Fit a sample into `limit` tokens; a document is the demands of its pages.

    Raises:
        Problem: it does not fit with one tile per image, one page per document and the minimum of frames per
            video.
    """
    single = [1] * len(images)
    fewest = [min(video.minimum, video.wanted) for video in videos]
    n_pages = []
    if documents:
        n_pages = _give(
            [1] * len(documents),
            [len(pages) for pages in documents],
            lambda n: count(single, _frames(videos, fewest), [[1] * k for k in n]),
            limit,
        )
    pages = tuple(spread(0, len(d) - 1, n) for d, n in zip(documents, n_pages, strict=True))
    single_pages = [[1] * n for n in n_pages]
    n_frames = _give(
        fewest,
        [video.wanted for video in videos],
        lambda n: count(single, _frames(videos, n), single_pages),
        limit,
    )
    frames = _frames(videos, n_frames)
    shown = [[document[page] for page in p] for document, p in zip(documents, pages, strict=True)]
    for tile_limit in tile_limits(settings.max_tiles):
        grids = _grids(images, tile_limit, settings)
        page_grids = tuple(_grids(demands, tile_limit, settings) for demands in shown)
        n_tokens = count(_tiles(grids), frames, [_tiles(g) for g in page_grids])
        if n_tokens <= limit:
            break
    wanted = [_grids(demands, settings.max_tiles, settings) for demands in (images, *documents)]
    tiles_wanted = sum(sum(_tiles(g)) for g in wanted)
    return MediaPlan(grids, frames, pages, page_grids, n_tokens, tile_limit, tiles_wanted)


def _give(
    start: Sequence[int], wanted: Sequence[int], count: Callable[[Sequence[int]], int], limit: int
) -> list[int]:
    """Frames per video (pages per document): one more for the relatively emptiest, until one does not fit."""
    least = count(start)
    if least > limit:
        raise Problem("too long", f"needs at least {least} tokens, the limit is {limit}")
    order = _giving_order(start, wanted)

    def after(steps: int) -> list[int]:
        return [n + order[:steps].count(i) for i, n in enumerate(start)]

    def fits(steps: int) -> bool:
        return count(after(steps)) <= limit

    if not order or fits(len(order)):
        return after(len(order))
    # A frame costs far more than the others' labels may change by, so the first step that does not fit is
    # found by halving; a few steps before it are tried all the same, for tiles of very few tokens.
    first = bisect.bisect_left(range(1, len(order)), True, key=lambda steps: not fits(steps)) + 1
    near = range(max(1, first - 4), first)
    return after(next((steps for steps in near if not fits(steps)), first) - 1)


def _giving_order(start: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Which video each further frame goes to: the one with the smallest share of its demand, or the first."""
    heap = [(Fraction(n, w), i, n) for i, (n, w) in enumerate(zip(start, wanted, strict=True))]
    heapq.heapify(heap)
    order = []
    while heap:
        share, i, n = heapq.heappop(heap)
        if share < 1:
            order.append(i)
            heapq.heappush(heap, (Fraction(n + 1, wanted[i]), i, n + 1))
    return order


def _frames(videos: Sequence[VideoDemand], n: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(video.frames(k) for video, k in zip(videos, n, strict=True))


def _tiles(grids: Sequence[Grid]) -> list[int]:
    return [tile_count(grid) for grid in grids]


def _grids(images: Sequence[ImageDemand], tile_limit: int, settings: SamplingSettings) -> tuple[Grid, ...]:
    return tuple(
        select_grid(
            image.width,
            image.height,
            tile_size=settings.tile_size,
            max_tiles=min(tile_limit, image.max_tiles),
            tiling=settings.tiling,
            drawn=image.drawn,
        )
        for image in images
    )

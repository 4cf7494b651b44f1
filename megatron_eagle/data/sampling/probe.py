"""What has to be known of a media file before frames and grids are chosen; no pixels are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from megatron_eagle.data.media.documents import page_sizes, pixel_size
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.frame_list import common_clock, frame_list_name
from megatron_eagle.data.media.frame_table import FrameTable
from megatron_eagle.data.media.images import image_size
from megatron_eagle.data.media.remote.files import ONLY_LOCAL, MediaAccess
from megatron_eagle.data.media.source import FileMetadata, PageRef, file_metadata
from megatron_eagle.data.sample import Document, FrameList, VideoSource
from megatron_eagle.data.sampling.ads import ImageDemand, SamplingSettings, VideoDemand, wanted_frames
from megatron_eagle.hf_model.clips import clip_bounds, shown_seconds, uneven_times
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class ImageMetadata:
    """A picture's file and its size as shown, in pixels."""

    file: FileMetadata
    width: int
    height: int

    def demand(self, settings: SamplingSettings) -> ImageDemand:
        """What the picture asks of the sampler."""
        return ImageDemand(self.width, self.height, settings.max_tiles)

    def name(self, grid: tuple[int, int], tile_size: int) -> str:  # noqa: ARG002
        """What the picture is read from, as `PageMetadata.name` says it of a page."""
        return self.file.path


@dataclass(frozen=True)
class PageMetadata:
    """Page `number` (from 0) of a PDF file, and its size in points; it is drawn with at most `max_pixels`."""

    file: FileMetadata
    number: int
    width: float
    height: float
    max_pixels: int

    def demand(self, settings: SamplingSettings) -> ImageDemand:
        """What the page asks of the sampler: as many pixels as the tiles that it may have."""
        tile = settings.tile_size**2
        max_tiles = max(1, min(settings.max_tiles, self.max_pixels // tile))
        return ImageDemand(*pixel_size(self.width, self.height, max_tiles * tile), max_tiles, drawn=True)

    def name(self, grid: tuple[int, int], tile_size: int) -> str:
        """The page, drawn at the size of its grid."""
        return str(PageRef(self.file.path, self.number, grid[0] * tile_size, grid[1] * tile_size))


@dataclass(frozen=True)
class VideoMetadata:
    """A clip: its file, the file's frame table, the first and last frame number, its duration in seconds.

    Where frames are given one by one they are `pictures`, and `file` is their folder.
    `uneven` are the times of its frames if their rate varies (`clips.uneven_times`).
    """

    file: FileMetadata
    table: FrameTable
    first: int
    last: int
    duration: Fraction
    pictures: tuple[str, ...] = ()
    uneven: np.ndarray | None = field(default=None, compare=False)

    def name(self, frames: Sequence[int]) -> str:
        """What these frames are read from."""
        if not self.pictures or not frames:
            return self.file.path
        return frame_list_name({number: self.pictures[number] for number in frames})

    def demand(self, settings: SamplingSettings) -> VideoDemand:
        """What the clip asks of the sampler."""
        wanted = wanted_frames(self.last - self.first + 1, self.duration, settings)
        return VideoDemand(self.first, self.last, wanted, settings.min_frames, self.uneven)

    def times(self, frames: Sequence[int]) -> list[float]:
        """Presentation times of frame numbers, in seconds of the file's own clock."""
        time_base = self.table.time_base
        return [
            pts * time_base.numerator / time_base.denominator for pts in self.table.pts[list(frames)].tolist()
        ]


def probe_image(
    path: str, max_pixels: int, strict_jpeg: bool = False, files: MediaAccess = ONLY_LOCAL
) -> ImageMetadata:
    """Check a picture to its end and read its size.

    Raises:
        Problem: as `images.image_size`, and as `MediaAccess.local`.
    """
    with files.local(path) as local:
        width, height = image_size(local, max_pixels=max_pixels, strict_jpeg=strict_jpeg)
        return ImageMetadata(replace(file_metadata(local), path=path), width, height)


def probe_document(
    document: Document, max_pixels: int, strict_jpeg: bool = False, files: MediaAccess = ONLY_LOCAL
) -> list[ImageMetadata] | list[PageMetadata]:
    """The pages of a document, whether it is a PDF file or a list of pictures.

    Raises:
        Problem: a page cannot be read.
    """
    if not isinstance(document, str):
        return [probe_image(page, max_pixels, strict_jpeg, files) for page in document]
    with files.local(document) as local:
        sizes, file = page_sizes(local), replace(file_metadata(local), path=document)
    return [PageMetadata(file, number, *size, max_pixels) for number, size in enumerate(sizes)]


def probe_video(source: VideoSource, files: MediaAccess = ONLY_LOCAL) -> VideoMetadata:
    """Read a video's frame table and find the clip in it.

    The duration of N frames is span + span / (N - 1) of their presentation times (one frame: its own
    duration, or a second if the file does not say); that of a clip is end - start, as far as the file goes.
    All in exact rationals.

    Raises:
        Problem: the video cannot be read, or its clip has no frames.
    """
    listed = source.frames
    table = _list_table(source.path, listed, files) if listed else _file_table(source.path, files)
    n = len(table.pts)
    begin = int(table.pts[0]) * table.time_base
    span = (int(table.pts[-1]) - int(table.pts[0])) * table.time_base
    duration = shown_seconds(n, span, table.last_duration * table.time_base)
    first, last = 0, n - 1
    if source.start is not None or source.end is not None:
        start, end = clip_bounds(begin, begin + duration, source.start, source.end)
        duration = end - start
        # Frames with start <= t < end; an integer is below a rational exactly if it is below its ceiling.
        bounds = [-((-t) // table.time_base) for t in (start, end)]
        first, stop = np.searchsorted(table.pts, bounds, side="left").tolist()
        last = stop - 1
        if last < first:
            asked = [
                float(t if own is None else own) for own, t in ((source.start, start), (source.end, end))
            ]
            raise Problem("empty clip", f"{source.path} shows no frame from {asked[0]:g} s to {asked[1]:g} s")
    pictures = listed.pictures if listed else ()
    uneven = uneven_times(table.pts[first : last + 1])
    return VideoMetadata(table.file, table, first, last, duration, pictures, uneven)


def _file_table(path: str, files: MediaAccess) -> FrameTable:
    with files.local(path) as local:
        table = read_frame_table(local)
    return replace(table, file=replace(table.file, path=path))


def _list_table(folder: str, frames: FrameList, files: MediaAccess) -> FrameTable:
    """The frame table of pictures: each is a key frame.

    Raises:
        Problem: one is missing.
    """
    for picture in frames.pictures:
        files.metadata(picture)
    time_base, times = common_clock(frames.times)
    pts = np.array(times, np.int64)
    return FrameTable(
        file=FileMetadata(folder, 0, 0),
        fingerprint=0,
        stream=0,
        rotation=0,
        time_base=time_base,
        open_gop=False,
        linear_reason="",
        pts=pts,
        keyframes=pts,
        last_duration=0,
    )

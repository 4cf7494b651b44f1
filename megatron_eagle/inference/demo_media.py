"""What the demo page shows of an upload: its kind, the frames, tiles or pages that a model sees, tokens.

Only the content of an upload says what it is; playlists, which could name other files, are no videos here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image, UnidentifiedImageError

from megatron_eagle.data.media.thumbnails import jpeg_url
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import has_thumbnail, select_grid
from megatron_eagle.hf_model.media_files import (
    DEFAULT_MAX_FRAMES,
    frame_count,
    load_image,
    load_video,
    video_settings,
)
from megatron_eagle.hf_model.pictures import open_picture
from megatron_eagle.hf_model.prompt import PromptMedium
from megatron_eagle.inference.generate import Request, Sampling, pages_of, video_item
from megatron_eagle.inference.pages import page_pictures

_THUMBNAIL = 168  # pixels, longer side
_HEAD = 1024  # bytes in which a kind of file is recognised
_VIDEO_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free")
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")


@dataclass(frozen=True)
class Limits:
    """What an upload may be."""

    megabytes: int = 200
    pixels: int = 50_000_000  # of a picture
    question_pixels: int = 1_000_000_000  # in memory at once while a question is read
    pages: int = 64
    seconds: int = 3600

    def __str__(self) -> str:
        return (
            f"up to {self.megabytes} MB, {self.pixels / 1e6:g} megapixels, {self.pages} pages, "
            f"{self.seconds / 60:g} minutes; {self.question_pixels / 1e6:,g} megapixels a question"
        )


@dataclass(frozen=True)
class Thumbnail:
    """A frame, tile or page: a small picture as a data URL, what it is, and the grid of a page."""

    picture: str
    label: str
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Shown:
    """An upload as the model sees it; `visual_tokens` is None where a server does the tiling.

    `grid` (columns, rows) is a picture's: the first of the pieces are its tiles, row by row.
    """

    kind: str  # image, video or document
    summary: str
    pieces: list[Thumbnail]
    visual_tokens: int | None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Seen:
    """What is shown of an upload, what a prompt says of it (`parts`, one of each page; none where a server
    does the tiling), and its pixels, which an answer holds in memory; of a video that is too long for the
    model, the most frames of it that are asked about."""

    shown: Shown
    parts: tuple[PromptMedium, ...]
    pixels: int
    max_frames: int | None = None


@dataclass(frozen=True)
class Viewer:
    """Looks at uploads as `processor` (None: unknown) and `sampling` do.

    A video is shown with as many frames as fit into `length` tokens beside an answer, and an eighth of that
    for text; None: with all.
    """

    processor: Any
    sampling: Sampling
    limits: Limits
    length: int | None = None

    def look(self, path: Path) -> Seen:
        """What is in a file, within the limits of the page.

        Raises:
            UserError: it is unreadable or over a limit; the path is named.
        """
        kind = _kind(path)
        try:
            return {"image": self._image, "video": self._video, "document": self._document}[kind](str(path))
        except av.error.FFmpegError as error:
            raise UserError(f"the video cannot be read: {error.strerror}") from None
        except ValueError as error:  # the loaders' own messages
            raise UserError(str(error)) from None

    def count(self, seen: list[Seen], request: Request) -> tuple[int, int] | None:
        """Visual tokens of a question's prompt and all others, without reading the uploads again.

        Args:
            seen: the uploads of `request`.

        Returns:
            None where a server does the tiling.

        Raises:
            UserError: the prompt names pictures or videos that are not there.
        """
        if self.processor is None:
            return None
        order = ("image", "document", "video")
        ordered = [(kind, part) for kind in order for s in seen if s.shown.kind == kind for part in s.parts]
        parts = {
            "image": [part for kind, part in ordered if kind != "video"],
            "video": [part for kind, part in ordered if kind == "video"],
        }
        items = [{"type": kind, kind: "an upload"} for kind, own in parts.items() for _ in own]
        try:
            text = self.processor.apply_chat_template(request.conversation(items), add_generation_prompt=True)
            written, _ = self.processor.place(text, parts)
        except ValueError as error:
            raise UserError(str(error)) from None
        visual = sum(sum(part.tiles) for _, part in ordered) * self.processor.tokens_per_tile
        return visual, len(self.processor.encode(written)) - visual

    def _image(self, path: str) -> Seen:
        with open_picture(path) as opened:  # reads no pixels yet
            _check_pixels("the picture", *opened.size, self.limits.pixels)
        image = load_image(path)
        size, pixels = f"{image.width} x {image.height} pixels", image.width * image.height
        if self.processor is None:
            piece = _piece(image, "the picture")
            return Seen(Shown("image", f"{size}, tiles: the server's choice", [piece], None), (), pixels)
        grid = self._grid(image)
        columns, rows = grid
        cut = self.processor.image_processor.tile_image(image, max_dynamic_tiles=self.sampling.max_tiles)
        labels = [f"row {row + 1}, column {column + 1}" for row in range(rows) for column in range(columns)]
        summary = f"{size}, {columns} x {rows} tile{'s' if len(labels) > 1 else ''}"
        if len(cut) > len(labels):
            labels, summary = [*labels, "thumbnail: the whole picture"], f"{summary} and the thumbnail"
        pieces = [
            _piece(Image.fromarray(tile.permute(1, 2, 0).numpy()), label)
            for tile, label in zip(cut, labels, strict=True)
        ]
        shown = Shown("image", summary, pieces, len(cut) * self.processor.tokens_per_tile, grid)
        return Seen(shown, (PromptMedium((len(cut),)),), pixels)

    def _video(self, path: str) -> Seen:
        item = video_item(path, self.sampling)
        lowered = self._lowered(item)
        if lowered is not None:
            item["max_frames"] = lowered
        options = video_settings(item, getattr(self.processor, "max_frames", DEFAULT_MAX_FRAMES))
        with av.open(path, metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError("the video has no picture in it")
            codec = container.streams.video[0].codec_context
            pixels = codec.width * codec.height
            known = container.duration is not None
            seconds = (container.duration or 0) / av.time_base
        if seconds > self.limits.seconds:
            raise UserError(
                f"the video takes {seconds / 60:.1f} minutes, limit {self.limits.seconds / 60:g}: "
                "cut it, or raise --max-minutes"
            )
        most = frame_count(2**31, seconds if known else self.limits.seconds, **options)
        self.check_memory(f"{most} frames of {codec.width} x {codec.height} pixels", most * pixels)
        frames = load_video(path, **options)
        pieces = [_piece(f, f"{time:.2f} s") for f, time in zip(frames, frames.timestamps, strict=True)]
        summary = f"{len(frames)} frames, {frames.fps:.2f} a second"
        pixels *= len(frames)
        if self.processor is None:
            return Seen(Shown("video", summary, pieces, None), (), pixels)
        tokens = len(frames) * self.processor.tokens_per_tile
        part = PromptMedium((1,) * len(frames), frames.fps, tuple(frames.timestamps))
        if lowered is not None:
            summary += ", as many as the model takes"
        return Seen(Shown("video", summary, pieces, tokens), (part,), pixels, lowered)

    def _lowered(self, item: dict[str, Any]) -> int | None:
        """Frames that a prompt holds of a video, where it does not hold all that it may show."""
        if self.length is None or not hasattr(self.processor, "fit"):
            return None
        room = self.length - self.length // 8
        fitted = self.processor.fit("<video-1>", [], [item], room, self.sampling.max_new_tokens)
        return int(fitted.videos[0]["max_frames"]) if fitted.lowered else None

    def _document(self, path: str) -> Seen:
        parts: tuple[PromptMedium, ...] = ()
        tokens = None
        if self.processor is None:
            pages = page_pictures(path, max_pages=self.limits.pages)
            pieces = [_piece(page, f"page {k}") for k, page in enumerate(pages, 1)]
            summary = f"{_pages(len(pages))}, tiles: the server's choice"
        else:
            pages = pages_of(self.processor, path, self._max_tiles, self.limits.pages)
            grids = [self._grid(page) for page in pages]
            pieces = [
                _piece(page, f"page {k}: {grid[0]} x {grid[1]} tiles", grid)
                for k, (page, grid) in enumerate(zip(pages, grids, strict=True), 1)
            ]
            counts = [columns * rows + self._has_whole((columns, rows)) for columns, rows in grids]
            parts = tuple(PromptMedium((count,)) for count in counts)
            summary = f"{_pages(len(pages))}, {sum(counts)} tiles with the thumbnail of each page"
            tokens = sum(counts) * self.processor.tokens_per_tile
        pixels = sum(page.width * page.height for page in pages)
        return Seen(Shown("document", summary, pieces, tokens), parts, pixels)

    def held(self, seen: list[Seen]) -> int:
        """Pixels in memory at once while a question on these uploads is read: drawn pages, one picture or
        video at a time, and the tiles of all, whose numbers take as much as four pixels."""
        if self.processor is None:  # a server gets all of them
            return sum(one.pixels for one in seen)
        drawn = sum(one.pixels for one in seen if one.shown.kind == "document")
        decoded = max((one.pixels for one in seen if one.shown.kind != "document"), default=0)
        tiles = sum(sum(part.tiles) for one in seen for part in one.parts)
        return int(drawn + decoded + 4 * tiles * self.processor.image_processor.size["height"] ** 2)

    def check_memory(self, what: str, pixels: int) -> None:
        """Refuse what would take too much memory.

        Raises:
            UserError: `what` has more pixels than may be in memory at once.
        """
        if pixels > (limit := self.limits.question_pixels):
            raise UserError(
                f"{what} are {pixels / 1e6:,.1f} megapixels at once, limit {limit / 1e6:,g}: show less, or "
                "raise --max-question-megapixels"
            )

    @property
    def _max_tiles(self) -> int:
        return self.sampling.max_tiles or self.processor.image_processor.max_dynamic_tiles

    def _has_whole(self, grid: tuple[int, int]) -> bool:
        return has_thumbnail(grid) and self.processor.image_processor.use_thumbnail

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        images = self.processor.image_processor
        limits = {"max_tiles": self._max_tiles, "min_tiles": images.min_dynamic_tiles}
        return select_grid(
            image.width, image.height, tile_size=images.size["height"], tiling=images.tiling, **limits
        )


def _check_pixels(what: str, width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise UserError(f"{what} has {width} x {height} pixels, limit {limit / 1e6:g} megapixels")


def _pages(count: int) -> str:
    return f"{count} page{'s' if count > 1 else ''}"


def request_of(prompt: str, media: list[tuple[Path, Seen]], turns: tuple[tuple[str, str], ...]) -> Request:
    """A question on uploads."""

    def paths(kind: str) -> tuple[str, ...]:
        return tuple(str(path) for path, seen in media if seen.shown.kind == kind)

    videos = tuple(
        str(path) if seen.max_frames is None else {"video": str(path), "max_frames": seen.max_frames}
        for path, seen in media
        if seen.shown.kind == "video"
    )
    return Request(prompt, paths("image"), videos, documents=paths("document"), turns=turns)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if b"%PDF-" in head:
        return "document"
    box, brand = head[4:8], head[8:12]
    riff = brand if head[:4] == b"RIFF" else b""
    video = box in _VIDEO_BOXES or head[:4] == b"\x1a\x45\xdf\xa3" or riff == b"AVI "
    if video and not (box == b"ftyp" and brand in _PICTURE_BRANDS):
        return "video"
    try:
        open_picture(path).close()
    except Image.DecompressionBombError:
        raise UserError("the picture has too many pixels") from None
    except (UnidentifiedImageError, SyntaxError, ValueError):
        raise UserError(
            "neither a picture (JPEG, PNG, WebP, ...), a video (MP4, MOV, MKV, WebM, AVI) nor a PDF file"
        ) from None
    except OSError as error:
        raise UserError(f"the picture cannot be read: {error}") from None
    return "image"


def _piece(image: Image.Image, label: str, grid: tuple[int, int] | None = None) -> Thumbnail:
    return Thumbnail(jpeg_url(image, _THUMBNAIL, quality=75), label, grid)

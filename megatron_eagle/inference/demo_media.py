"""What the demo page shows of an upload: its kind, the frames, tiles or pages that a model sees, tokens.

Only the content of an upload says what it is; playlists, which could name other files, are no videos here.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from PIL import Image

from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.hf_model.media_files import load_image, load_video
from megatron_eagle.inference.generate import Request, Sampling, pages_of, video_item
from megatron_eagle.inference.pages import page_pictures

_THUMBNAIL = 168  # pixels, longer side
_HEAD = 1024  # bytes in which a kind of file is recognised


@dataclass(frozen=True)
class Limits:
    """What an upload may be."""

    megabytes: int = 200
    pixels: int = 50_000_000  # of a picture
    frame_pixels: int = 9_000_000  # all frames that a video is sampled at are in memory at once
    pages: int = 64
    seconds: int = 3600

    def __str__(self) -> str:
        return (
            f"up to {self.megabytes} MB, {self.pixels / 1e6:g} megapixels, {self.pages} pages, "
            f"{self.seconds / 60:g} minutes"
        )


@dataclass(frozen=True)
class Thumbnail:
    """A frame, tile or page: a small picture as a data URL, and what it is."""

    picture: str
    label: str


@dataclass(frozen=True)
class Shown:
    """An upload as the model sees it; `visual_tokens` is None where a server does the tiling."""

    kind: str  # image, video or document
    summary: str
    pieces: list[Thumbnail]
    visual_tokens: int | None


@dataclass(frozen=True)
class Viewer:
    """Looks at uploads as `processor` (None: unknown) and `sampling` do."""

    processor: Any
    sampling: Sampling
    limits: Limits

    def look(self, path: Path) -> Shown:
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

    def _image(self, path: str) -> Shown:
        with Image.open(path) as opened:  # reads no pixels yet
            _check_pixels("the picture", *opened.size, self.limits.pixels)
        image = load_image(path)
        size = f"{image.width} x {image.height} pixels"
        if self.processor is None:
            return Shown("image", f"{size}, tiles: the server's choice", [_piece(image, "whole")], None)
        columns, rows = self._grid(image)
        cut = self.processor.image_processor.tile_image(image, max_dynamic_tiles=self.sampling.max_tiles)
        tiles = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in cut]
        labels = [f"row {k // columns + 1}, column {k % columns + 1}" for k in range(columns * rows)]
        pieces = [
            _piece(t, label) for t, label in zip(tiles, [*labels, "whole"][-len(tiles) :], strict=False)
        ]
        summary = f"{size}, {columns} x {rows} tiles{' and the whole' if len(tiles) > len(labels) else ''}"
        return Shown("image", summary, pieces, len(tiles) * self.processor.tokens_per_tile)

    def _video(self, path: str) -> Shown:
        with av.open(path, metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError("the video has no picture in it")
            codec = container.streams.video[0].codec_context
            _check_pixels("a frame", codec.width, codec.height, self.limits.frame_pixels)
            seconds = (container.duration or 0) / av.time_base
        if seconds > self.limits.seconds:
            raise UserError(
                f"the video takes {seconds / 60:.1f} minutes, limit {self.limits.seconds / 60:g}: "
                "cut it, or raise --max-minutes"
            )
        item = video_item(path, self.sampling)
        options = {k: v for k, v in item.items() if k not in ("type", "video") and v is not None}
        frames = load_video(path, **options)
        pieces = [_piece(f, f"{time:.2f} s") for f, time in zip(frames, frames.timestamps, strict=True)]
        known = self.processor is not None
        tokens = len(frames) * self.processor.tokens_per_tile if known else None
        return Shown("video", f"{len(frames)} frames, {frames.fps:.2f} a second", pieces, tokens)

    def _document(self, path: str) -> Shown:
        if self.processor is None:
            pages = page_pictures(path, max_pages=self.limits.pages)
            pieces = [_piece(page, f"page {k}") for k, page in enumerate(pages, 1)]
            return Shown("document", f"{len(pages)} pages, tiles: the server's choice", pieces, None)
        pieces, tiles = [], 0
        for k, page in enumerate(pages_of(self.processor, path, self._max_tiles, self.limits.pages), 1):
            columns, rows = self._grid(page)
            pieces.append(_piece(page, f"page {k}: {columns} x {rows} tiles"))
            tiles += columns * rows + self._has_whole(columns * rows)
        summary = f"{len(pieces)} pages, {tiles} tiles"
        return Shown("document", summary, pieces, tiles * self.processor.tokens_per_tile)

    @property
    def _max_tiles(self) -> int:
        return self.sampling.max_tiles or self.processor.image_processor.max_dynamic_tiles

    def _has_whole(self, cells: int) -> bool:
        return cells > 1 and self.processor.image_processor.use_thumbnail

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        images = self.processor.image_processor
        limits = {"max_tiles": self._max_tiles, "min_tiles": images.min_dynamic_tiles}
        return select_grid(
            image.width, image.height, tile_size=images.size["height"], tiling=images.tiling, **limits
        )


def _check_pixels(what: str, width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise UserError(f"{what} has {width} x {height} pixels, limit {limit / 1e6:g} megapixels")


def request_of(prompt: str, media: list[tuple[str, str]], turns: tuple[tuple[str, str], ...]) -> Request:
    """A question on uploads, given as (kind, path)."""
    paths = {kind: tuple(p for k, p in media if k == kind) for kind in ("image", "video", "document")}
    return Request(prompt, paths["image"], paths["video"], documents=paths["document"], turns=turns)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if b"%PDF-" in head:
        return "document"
    brand = head[4:12]
    riff = head[8:12] if head[:4] == b"RIFF" else b""
    if brand in (b"ftypavif", b"ftypheic"):
        return "image"
    if (
        brand[:4] in (b"ftyp", b"moov", b"mdat", b"wide", b"free")
        or head[:4] == b"\x1a\x45\xdf\xa3"
        or riff == b"AVI "
    ):
        return "video"
    try:
        Image.open(path).close()
    except (OSError, SyntaxError, ValueError):
        raise UserError(
            "neither a picture (JPEG, PNG, WebP, ...), a video (MP4, MOV, MKV, WebM, AVI) nor a PDF file"
        ) from None
    except Image.DecompressionBombError:
        raise UserError("the picture has too many pixels") from None
    return "image"


def _piece(image: Image.Image, label: str) -> Thumbnail:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", label)

"""Where a prompt has no room for all that was asked for: fewer frames and tiles, down to what was demanded.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). `max_frames` and `max_dynamic_tiles` are limits, and are lowered; `nframes`,
`min_frames` and `min_dynamic_tiles` are demands. As in training all text stays, and time goes before space:
first as many frames as fit beside pictures of the fewest tiles, then the largest limit of tiles that fits.
Tokens are counted exactly; videos are not decoded for that, but one frame where frames are tiled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .grids import tile_limits
from .media_files import (
    DEFAULT_FPS,
    DEFAULT_MIN_FRAMES,
    FRAME_MULTIPLE,
    frame_count,
    load_image,
    load_video,
    read_clip,
    subtitles_of_part,
    video_settings,
)
from .prompt import PromptMedium

DEFAULT_ANSWER = 512  # tokens, where nobody says how long an answer may be
_LABEL = 64  # characters at most around a picture or a frame, and so tokens


def prompt_room(length: int, answer: int | None = None) -> int:
    """Tokens of a prompt, of a model or server that takes `length` with the answer: the answer keeps its own,
    but no more than a quarter."""
    return length - min(DEFAULT_ANSWER if answer is None else answer, length // 4)


@dataclass(frozen=True)
class Fitted:
    """What a prompt has room for.

    Attributes:
        videos: the parts that were given, with lower `max_frames` where need be.
        tiling: `images_kwargs` likewise, with a lower `max_dynamic_tiles`.
        frame_tiles: likewise.
        tokens: of the prompt then; None: it fits whatever its media are.
        lowered: whether there was no room for all.
    """

    videos: list[dict[str, Any]]
    tiling: dict[str, Any]
    frame_tiles: int | None
    tokens: int | None
    lowered: bool


def fit(
    export: Any,
    text: str,
    images: Sequence[Any],
    videos: Sequence[Mapping[str, Any]],
    room: int,
    tiling: Mapping[str, Any] | None = None,
    frame_tiles: int | None = None,
) -> Fitted:
    """Lower a prompt's limits until it has at most `room` tokens, or to the fewest frames and tiles.

    Args:
        export: the processor.
        text: with placeholders, as `apply_chat_template` writes it.
        images: as `load_image` takes them.
        videos: parts of messages.
        tiling: `images_kwargs` of the processor's call.
        frame_tiles: `max_dynamic_tiles` of its `videos_kwargs`.

    Raises:
        ValueError: a medium cannot be read, or has no placeholder in the text.
    """
    tiling, own = dict(tiling or {}), [dict(video) for video in videos]
    asked = tiling.get("max_dynamic_tiles", export.image_processor.max_dynamic_tiles)
    fewest = tiling.get("min_dynamic_tiles", export.image_processor.min_dynamic_tiles)
    # Grids of more tiles than a prompt holds are not even looked for.
    held = max(1, room // export.tokens_per_tile)
    frame_tiles, most = None if frame_tiles is None else min(frame_tiles, held), max(fewest, min(asked, held))
    cut = tiling if most == asked else {**tiling, "max_dynamic_tiles": most}
    if _at_most(export, text, images, videos, most, frame_tiles) <= room:
        return Fitted(own, cut, frame_tiles, None, False)

    prompt = _Prompt(export, text, images, videos, cut, frame_tiles)
    tokens = prompt.count(prompt.most_frames, most)
    if tokens <= room:
        return Fitted(own, cut, frame_tiles, tokens, False)
    steps = range(FRAME_MULTIPLE, prompt.most_frames + 1, FRAME_MULTIPLE)
    low, high = 0, len(steps)  # `low` is taken even if it does not fit, `high` is beyond
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if prompt.count(steps[middle], fewest) <= room else (low, middle)
    frames = steps[low] if steps else 0
    limits = [limit for limit in tile_limits(most) if limit >= fewest]
    tiles = next((t for t in limits if prompt.count(frames, t) <= room), fewest)
    for part, video in zip(own, prompt.videos, strict=True):
        if not video.fixed:
            part["max_frames"] = video.limit(frames)
    return Fitted(own, {**cut, "max_dynamic_tiles": tiles}, frame_tiles, prompt.count(frames, tiles), True)


def _at_most(
    export: Any,
    text: str,
    images: Sequence[Any],
    videos: Sequence[Mapping[str, Any]],
    tiles: int,
    frame_tiles: int | None,
) -> int:
    """Tokens that the prompt has at most, without a look at its media."""
    of_tile = export.tokens_per_tile
    frames = 0
    for video in videos:
        settings = video_settings(video, export.max_frames)
        given = isinstance(video["video"], (list, tuple))
        text += "".join(f"\n{said}\n" for _, _, said in subtitles_of_part(video))
        frames += len(video["video"]) if given else settings.get("nframes", settings.get("max_frames", 0)) + 2
    tokens = len(text.encode()) + len(images) * ((tiles + 1) * of_tile + _LABEL)
    return int(
        tokens + frames * ((1 if frame_tiles is None else frame_tiles + 1) * of_tile + _LABEL) + _LABEL
    )


class _Video:
    """How many frames a video gets under a limit, and what a prompt says of them."""

    def __init__(self, export: Any, part: Mapping[str, Any], frame_tiles: int | None) -> None:
        source, settings = part["video"], video_settings(part, export.max_frames)
        self.fixed = "nframes" in settings or isinstance(source, (list, tuple))
        self._export, self._subtitles = export, subtitles_of_part(part)
        self._cutting = {"max_dynamic_tiles": frame_tiles}
        self._images = export.image_processor
        self._given: PromptMedium | None = None
        if isinstance(source, (list, tuple)):
            fps = float(settings.get("fps", DEFAULT_FPS))
            tiles = tuple(1 if frame_tiles is None else self._tiles(load_image(frame)) for frame in source)
            self._given = self._medium(tiles, fps, [i / fps for i in range(len(source))])
            self.wanted = len(source)
            return
        bounds = {name: settings.pop(name) for name in ("video_start", "video_end") if name in settings}
        self._settings = settings
        self._clip = read_clip(source, **bounds)
        self._of_frame = 1
        if frame_tiles is not None:
            self._of_frame = self._tiles(load_video(source, **bounds, nframes=FRAME_MULTIPLE)[0])
        self.wanted = self._frames(settings.get("max_frames"))

    def limit(self, frames: int) -> int:
        """`max_frames` under a limit of `frames`: no more than was asked for, no less than must be."""
        asked = int(self._settings["max_frames"])
        least = self._settings.get("min_frames")
        return min(asked, max(frames, DEFAULT_MIN_FRAMES if least is None else int(least)))

    def medium(self, frames: int) -> PromptMedium:
        """What a prompt says of it under a limit of `frames`."""
        if self._given is not None:
            return self._given
        n = self._frames(None if self.fixed else self.limit(frames))
        numbers = self._clip.numbers(n)
        return self._medium((self._of_frame,) * n, self._clip.fps(n), self._clip.times(numbers))

    def _medium(self, tiles: tuple[int, ...], fps: float, times: Sequence[float]) -> PromptMedium:
        return PromptMedium(tiles, fps, tuple(times), self._export.said(self._subtitles, times))

    def _frames(self, limit: int | None) -> int:
        settings = self._settings if limit is None else {**self._settings, "max_frames": limit}
        return frame_count(self._clip.available, float(self._clip.duration), **settings)

    def _tiles(self, frame: Any) -> int:
        return int(self._images.count_tiles(frame.width, frame.height, **self._cutting))


class _Prompt:
    """A prompt's exact number of tokens under limits of frames and tiles."""

    def __init__(
        self,
        export: Any,
        text: str,
        images: Sequence[Any],
        videos: Sequence[Mapping[str, Any]],
        tiling: Mapping[str, Any],
        frame_tiles: int | None,
    ) -> None:
        self._export, self._text, self._tiling = export, text, tiling
        self._sizes = [load_image(image).size for image in images]
        self.videos = [_Video(export, video, frame_tiles) for video in videos]
        self.most_frames = max((video.wanted for video in self.videos if not video.fixed), default=0)

    def count(self, frames: int, tiles: int) -> int:
        """Tokens, with up to `frames` of each video and `tiles` of each picture."""
        cutting = {**self._tiling, "max_dynamic_tiles": tiles}
        counts = [self._export.image_processor.count_tiles(*size, **cutting) for size in self._sizes]
        media = {
            "image": [PromptMedium((count,)) for count in counts],
            "video": [video.medium(frames) for video in self.videos],
        }
        written, order = self._export.place(self._text, media, tokens_per_tile=0)
        shown = sum(sum(media[kind][number].tiles) for kind, number in order)
        return len(self._export.encode(written)) + shown * int(self._export.tokens_per_tile)

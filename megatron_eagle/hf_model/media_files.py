"""Pictures and videos from wherever a message names them: files, URLs, base64, PIL.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x).
"""

import base64
import binascii
import bisect
import io
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .clips import choose_frames, clip_bounds, shown_seconds, uneven_times
from .pictures import open_picture, to_rgb
from .subtitles import Subtitle, read_subtitles

DEFAULT_FPS = 2.0
DEFAULT_MIN_FRAMES = 4
DEFAULT_MAX_FRAMES = 256
FRAME_MULTIPLE = 2  # sampled frame counts are even, as in the released processor


class VideoFrames(list[Any]):
    """Frames of one video (PIL RGB) with `fps` as sampled and `timestamps` in seconds, one per frame.

    `numbers` are theirs in the file, from 0 in presentation order; None where they come from none.
    `subtitles` are the video's, also those of no frame.
    """

    def __init__(
        self,
        frames: Iterable[Any],
        fps: float,
        timestamps: list[float],
        numbers: Iterable[int] | None = None,
        subtitles: tuple[Subtitle, ...] = (),
    ) -> None:
        super().__init__(frames)
        self.fps = fps
        self.timestamps = timestamps
        self.numbers = None if numbers is None else list(numbers)
        self.subtitles = subtitles


def load_image(source: Any) -> Image.Image:
    """RGB picture from a PIL image, a file's bytes, a path, `file://`, `http(s)://` or a `data:` URL.

    Raises:
        ValueError: the picture is missing or cannot be decoded; the message names it.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    name = _shown(source)
    try:
        data = _contents(source)
        with open_picture(_path(source) if data is None else io.BytesIO(data)) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"image not found: {name}") from None
    except (
        OSError,
        UnidentifiedImageError,
        SyntaxError,
        binascii.Error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"image cannot be read: {name} ({error})") from None


def _shown(source: Any) -> str:
    """For messages: a URL may hold the whole file."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return str(source) if len(str(source)) < 200 else str(source)[:80] + "..."


def _contents(source: Any) -> bytes | None:
    """The bytes of what is no file here; None: it is one.

    Raises:
        OSError: a URL that cannot be fetched.
        binascii.Error: what is no base64.
    """
    if isinstance(source, bytes):
        return source
    name = str(source)
    if name.startswith("data:"):
        return base64.b64decode(name.partition("base64,")[2], validate=True)
    if name.startswith(("http://", "https://")):
        with urllib.request.urlopen(name, timeout=60) as response:
            return bytes(response.read())
    return None


def _path(source: Any) -> str:
    return str(source).removeprefix("file://")


def frame_count(
    available: int,
    duration: float,
    fps: float | None = None,
    nframes: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
) -> int:
    """Frames to take of a video with `available` frames over `duration` seconds: an even number.

    Either `nframes`, or `fps` (2 by default) between `min_frames` (4) and `max_frames` (256).
    """
    if fps is not None and nframes is not None:
        raise ValueError("give a video either fps or nframes, not both")
    wanted: float
    if nframes is not None:
        wanted = round(nframes / FRAME_MULTIPLE) * FRAME_MULTIPLE
    else:
        low = DEFAULT_MIN_FRAMES if min_frames is None else min_frames
        high = DEFAULT_MAX_FRAMES if max_frames is None else max_frames
        low = -(-low // FRAME_MULTIPLE) * FRAME_MULTIPLE
        wanted = min(max(duration * (DEFAULT_FPS if fps is None else fps), low), high)
    wanted = int(min(wanted, available)) // FRAME_MULTIPLE * FRAME_MULTIPLE
    return max(wanted, min(FRAME_MULTIPLE, available))


@dataclass(frozen=True)
class VideoClip:
    """What a video file may show: its frames from `first` to `last`, which are numbers from 0.

    Attributes:
        stamps: presentation time of every frame of the file, in units of `unit` seconds.
        keyframes: those of its key frames.
        duration: of the clip, in seconds.
        available: its frames.
        opened: the file, opened anew.
    """

    stamps: list[int]
    keyframes: list[int]
    unit: Fraction
    first: int
    last: int
    duration: Fraction
    available: int
    opened: Callable[[], Any]

    @cached_property
    def _uneven(self) -> np.ndarray | None:
        return uneven_times(self.stamps[self.first : self.last + 1])

    def numbers(self, n: int) -> tuple[int, ...]:
        """The `n` frames that are shown: at `linspace(first, last, n).round()`, or where the rate varies
        those nearest to evenly spaced times."""
        return choose_frames(self.first, self.last, n, self._uneven)

    def times(self, numbers: Iterable[int]) -> list[float]:
        """In seconds."""
        return [float(self.stamps[number] * self.unit) for number in numbers]

    def fps(self, n: int) -> float:
        """Of `n` frames: those over the clip's duration."""
        return float(n / self.duration)


def read_clip(source: Any, video_start: float | None = None, video_end: float | None = None) -> VideoClip:
    """A clip of a video; nothing is decoded. Arguments and errors are those of `load_video`."""
    import av  # only videos need it

    name = _shown(source)
    try:
        data = _contents(source)
    except (OSError, binascii.Error) as error:
        raise ValueError(f"video cannot be read: {name} ({error})") from None
    if data is None and not os.path.isfile(_path(source)):
        raise ValueError(f"video not found: {name}")

    def opened() -> Any:
        # Titles and the like may be in any encoding: they are not worth failing for.
        return av.open(_path(source) if data is None else io.BytesIO(data), metadata_errors="replace")

    with _naming(name):
        stamps, keyframes, unit, last_duration = _frame_table(opened)
    if not stamps:
        raise ValueError(f"video has no frames: {name}")
    times = [stamp * unit for stamp in stamps]
    end = times[0] + shown_seconds(len(times), times[-1] - times[0], last_duration * unit)
    asked = [None if t is None else Fraction(str(t)) for t in (video_start, video_end)]
    start, stop = clip_bounds(times[0], end, *asked)
    inside = [i for i, t in enumerate(times) if start <= t and (video_end is None or t < stop)]
    if not inside:
        begin, until = (t if own is None else own for own, t in zip(asked, (start, stop), strict=True))
        raise ValueError(f"video has no frame between {float(begin):g} s and {float(until):g} s: {name}")
    return VideoClip(stamps, keyframes, unit, inside[0], inside[-1], stop - start, len(inside), opened)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the decoder says, with the name of the file."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        raise ValueError(f"video cannot be read: {name} ({error.strerror})") from None


def load_video(
    source: Any, video_start: float | None = None, video_end: float | None = None, **sampling: Any
) -> VideoFrames:
    """Exact frames of a video file, in presentation order, by PyAV.

    Args:
        source: a file's bytes, a path, `file://`, `http(s)://` or a `data:` URL.
        video_start, video_end: clip in seconds; frames with start <= t < end are used.
        sampling: `fps`, `nframes`, `min_frames`, `max_frames`, see `frame_count`.

    Returns:
        The frames that `VideoClip.numbers` names.

    Raises:
        ValueError: the video is missing, unreadable, or has no frame in the clip; the message names it.
    """
    clip = read_clip(source, video_start, video_end)
    wanted = clip.numbers(frame_count(clip.available, float(clip.duration), **sampling))
    shown = frames_numbered(source, clip, wanted)
    return VideoFrames(shown, clip.fps(len(wanted)), clip.times(wanted), wanted)


def frames_numbered(source: Any, clip: VideoClip, numbers: Iterable[int]) -> list[Image.Image]:
    """The frames of a clip of `source` that have these numbers.

    Raises:
        ValueError: they cannot be decoded; the message names the file.
    """
    stamps = [clip.stamps[i] for i in numbers]
    with _naming(_shown(source)):
        frames = _decode(clip.opened, stamps, clip.keyframes)
    return [frames[stamp] for stamp in stamps]


def video_settings(item: Mapping[str, Any], most: int = DEFAULT_MAX_FRAMES) -> dict[str, Any]:
    """What a message's part says of how its video is sampled; `most` frames where it says nothing of them."""
    names = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
    settings = {name: item[name] for name in names if item.get(name) is not None}
    return settings if "nframes" in settings else {"max_frames": most, **settings}


def video_of_part(item: Mapping[str, Any], most: int = DEFAULT_MAX_FRAMES) -> VideoFrames:
    """What a message's part shows: a file, or pictures that are frames at its `fps`, sampled as they are.

    Args:
        most: frames of a file, where the part does not say how many.

    Raises:
        ValueError: as `load_video`, `load_image` and `read_subtitles`.
    """
    source, settings = item["video"], video_settings(item, most)
    subtitles = subtitles_of_part(item)
    if not isinstance(source, (list, tuple)):
        shown = load_video(source, **settings)
        shown.subtitles = subtitles
        return shown
    if not source:
        raise ValueError("a video given as a list of pictures is empty")
    fps = float(settings.get("fps", DEFAULT_FPS))  # of the list as it is: nothing is sampled
    times = [i / fps for i in range(len(source))]
    return VideoFrames([load_image(frame) for frame in source], fps, times, subtitles=subtitles)


def subtitles_of_part(item: Mapping[str, Any]) -> tuple[Subtitle, ...]:
    """The `subtitles` of a message's part.

    Raises:
        ValueError: as `read_subtitles`.
    """
    return () if item.get("subtitles") is None else read_subtitles(item["subtitles"])


def _frame_table(opened: Callable[[], Any]) -> tuple[list[int], list[int], Fraction, int]:
    """Presentation times of the shown frames and of the key frames, their unit in seconds, and the duration
    of the last packet in it (0: unknown).

    From the packets, without decoding: a container's own counts and rates are wrong on edit lists, variable
    frame rates and damaged files.
    """
    with opened() as container:
        if not container.streams.video:
            return [], [], Fraction(1), 0
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size and p.pts is not None]
        shown = {p.pts: p.duration or 0 for p in packets if not (p.is_discard or p.is_corrupt)}
        keyframes = sorted({p.pts for p in packets if p.is_keyframe})
        return sorted(shown), keyframes, stream.time_base, shown[max(shown)] if shown else 0


def _decode(opened: Callable[[], Any], wanted: list[int], keyframes: list[int]) -> dict[int, Image.Image]:
    """Upright RGB frames by presentation time; seeks from key frame to key frame.

    Where seeking misses (MPEG-TS, damaged indexes) everything is read from the start.
    """
    import av

    try:
        return _decode_from(opened, wanted, keyframes)
    except (_Missed, av.error.InvalidDataError):
        pass
    try:
        return _decode_from(opened, wanted, None)
    except _Missed as missed:
        raise ValueError(f"the frame at {missed} cannot be decoded: is the video damaged?") from None


class _Missed(Exception):
    """A wanted frame did not come out; a neighbour is no substitute."""


def _decode_from(
    opened: Callable[[], Any], wanted: list[int], keyframes: list[int] | None
) -> dict[int, Image.Image]:
    result: dict[int, Image.Image] = {}
    position = None
    with opened() as container:
        stream = container.streams.video[0]
        frames = container.decode(stream)
        for pts in sorted(set(wanted)):
            if keyframes:
                key = keyframes[max(bisect.bisect_right(keyframes, pts) - 1, 0)]
                if position is None or key > position:
                    container.seek(key, stream=stream, backward=True, any_frame=False)
                    frames = container.decode(stream)
            frame = next((f for f in frames if f.pts is not None and f.pts >= pts), None)
            if frame is None or frame.pts != pts or frame.is_corrupt:
                raise _Missed(f"{float(pts * stream.time_base):.2f} s")
            position = pts
            turns = round(getattr(frame, "rotation", 0) / 90)
            result[pts] = Image.fromarray(
                np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            )
    return result

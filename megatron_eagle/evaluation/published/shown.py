"""What of a question's videos is shown: how long they are, one limit of frames for all, when frames are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import av

from megatron_eagle.data.media.frame_index import open_video
from megatron_eagle.data.media.source import member_ref
from megatron_eagle.problems import Problem

MIN_FRAMES = 8  # of a video, in every benchmark
_PAIR = 2  # the processor shows an even number of frames
_BEFORE = 0.5123  # of a frame; times written in thousandths fall on a frame or halfway, and not on this
_MOMENT_RATE = 30.0  # frames in a second of a video that is not there to look at


@dataclass(frozen=True)
class Header:
    """What a file says of its video: seconds, and frames in a second."""

    seconds: float
    rate: float


@lru_cache(maxsize=4096)
def header(path: str) -> Header | None:
    """None for a file that is missing or does not say it; what is wrong with it is said when it is asked.

    None also for a video that is compressed in an archive: it would have to be unpacked for it.
    """
    member = member_ref(path)
    if member is not None and member.kind == "unzip":
        return None
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            unit = stream.time_base
            own = float(stream.duration * unit) if stream.duration and unit else 0.0
            seconds = own or (container.duration or 0) / av.time_base
    except (Problem, OSError, av.error.FFmpegError, IndexError, ValueError):
        return None
    return Header(seconds, rate) if seconds > 0 and rate > 0 else None


def moment(path: str, at: float) -> tuple[float, float]:
    """The part of a video that holds the one frame nearest to a time in seconds: as long as a frame lasts."""
    known = header(path)
    frame = 1 / (known.rate if known else _MOMENT_RATE)
    start = max(0.0, at - _BEFORE * frame)
    return start, start + 0.9999 * frame


def share_frames(videos: Sequence[dict[str, Any]], fps: float, most: int | None) -> list[dict[str, Any]]:
    """The videos of one question with the limit of frames shared among them, by what each would have.

    A limit is that of a question: twelve videos do not have it twelve times. Videos of one frame
    (`nframes`) keep it. What cannot be looked at counts as much as the longest that can.
    """
    sampled = [number for number, video in enumerate(videos) if "nframes" not in video]
    if most is None or len(videos) < 2 or not sampled:
        return list(videos)
    most = max(_PAIR, most - (len(videos) - len(sampled)))
    lengths = [_seconds(videos[number]) for number in sampled]
    longest = max((length for length in lengths if length is not None), default=most / fps)
    least = min(MIN_FRAMES, max(_PAIR, most // len(sampled)))
    wanted = [max(least, (longest if length is None else length) * fps) for length in lengths]
    scale = min(1.0, most / sum(wanted))
    shared = list(videos)
    for number, frames in zip(sampled, wanted, strict=True):
        limit = max(_PAIR, int(frames * scale) // _PAIR * _PAIR)
        limit = limit if scale < 1 else most
        shared[number] = videos[number] | {"max_frames": limit, "min_frames": min(least, limit)}
    return shared


def frame_times(video: dict[str, Any], fps: float, most: int | None) -> list[float]:
    """Seconds at which the frames of a video are that are shown, by its header; none if it has none."""
    known, seconds = header(video["video"]), _seconds(video)
    if known is None or seconds is None:
        return []
    count = max(MIN_FRAMES, int(seconds * fps))
    count = min(count if most is None else min(count, most), int(seconds * known.rate))
    count = max(1, count // _PAIR * _PAIR)
    last = max(0.0, seconds - 1 / known.rate)
    start = video.get("start_time", 0.0)
    return [start + last * i / max(1, count - 1) for i in range(count)]


def _seconds(video: dict[str, Any]) -> float | None:
    start, end = video.get("start_time"), video.get("end_time")
    if start is not None and end is not None:
        return float(end - start)
    known = header(video["video"])
    return None if known is None else max(0.0, (end or known.seconds) - (start or 0.0))

"""What a question showed: its pictures, a few of the frames of its videos that the model was given, and their
subtitles."""

from collections.abc import Callable
from html import escape
from typing import Any

from megatron_eagle.data.media.thumbnails import jpeg_url
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.media_files import (
    frame_count,
    frames_numbered,
    load_image,
    read_clip,
    subtitles_of_part,
    video_settings,
)
from megatron_eagle.hf_model.subtitles import between_frames
from megatron_eagle.inference.generate import Request, Sampling, video_item

_PICTURE, _FRAME = 320, 180  # pixels, longer side
_SAID = (
    "<details><summary>{name}: subtitles between its frames: {count:,}</summary><ul>{lines}</ul></details>"
)
_FRAMES, _PICTURES = 8, 16  # at most, of a video and of a question


def media_figures(request: Request, sampling: Sampling, local: Callable[[Request], Request]) -> str:
    """Figures with captions; for what cannot be shown a line that says why. `local` makes files of media."""
    parts = []
    try:
        request = local(request)
    except UserError as error:
        return f'<div class="media">{_problem(error)}</div>'
    for number, path in enumerate(request.images[:_PICTURES], 1):
        try:
            parts.append(_figure(jpeg_url(load_image(path), _PICTURE), f"picture {number}"))
        except ValueError as error:
            parts.append(_problem(error))
    if len(request.images) > _PICTURES:
        parts.append(f'<p class="note">and {len(request.images) - _PICTURES:,} more pictures</p>')
    for number, video in enumerate(request.videos, 1):
        try:
            parts += _frames(f"video {number}" if len(request.videos) > 1 else "video", video, sampling)
        except (ValueError, UserError) as error:
            parts.append(_problem(error))
    return f'<div class="media">{"".join(parts)}</div>' if parts else ""


def _frames(name: str, video: str | dict[str, Any], sampling: Sampling) -> list[str]:
    """Evenly chosen ones of those that the sampling gives."""
    item = video_item(video, sampling)
    settings = video_settings(item)
    clip = read_clip(item["video"], settings.pop("video_start", None), settings.pop("video_end", None))
    given = clip.numbers(frame_count(clip.available, float(clip.duration), **settings))
    places = sorted({round(i * (len(given) - 1) / (_FRAMES - 1)) for i in range(_FRAMES)})
    numbers = [given[place] for place in places]
    shown = zip(places, clip.times(numbers), frames_numbered(item["video"], clip, numbers), strict=True)
    figures = [
        _figure(jpeg_url(frame, _FRAME), f"{name}, frame {place + 1} of {len(given)}: {time:.1f} s")
        for place, time, frame in shown
    ]
    said = between_frames(subtitles_of_part(item), clip.times(given))
    lines = "".join(f"<li>after frame {before} of {len(given)}: {escape(text)}</li>" for before, text in said)
    return [*figures, _SAID.format(name=name, count=len(said), lines=lines)] if said else figures


def _figure(url: str, caption: str) -> str:
    return f'<figure><img src="{url}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _problem(error: Exception) -> str:
    return f'<p class="problem">not shown: {escape(str(error))}</p>'

"""How a video is sampled, in its URL after a `#`, so that several in one request may differ.

`https://host/clip.mp4#fps=4&video_start=1.5`, `data:video/mp4;base64,...#nframes=8`. `subtitles` are JSON.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl

# As in a message for the processor.
_COUNTS = ("nframes", "min_frames", "max_frames")
_SETTINGS = ("fps", "video_start", "video_end", *_COUNTS, "subtitles")


def split_url(url: str, general: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """A video's URL, and its settings: its own, and the `general` ones of a request or a server.

    Raises:
        ValueError: as `_read_settings`.
    """
    url, _, fragment = url.partition("#")
    own = _read_settings(parse_qsl(fragment, keep_blank_values=True))
    # `num_frames` is vLLM's own word, with which other clients ask.
    others = _read_settings(
        ("max_frames" if name == "num_frames" else name, value) for name, value in (general or {}).items()
    )
    if "nframes" in own:  # a number of frames, and a rate with its limits, exclude each other
        others = {name: value for name, value in others.items() if name not in ("fps", *_COUNTS)}
    return url, {**others, **own}


def _read_settings(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """How a video is sampled, from names and values.

    Raises:
        ValueError: an unknown name, or a value that is no number.
    """
    settings: dict[str, Any] = {}
    for name, value in pairs:
        if value is None:
            continue
        if name not in _SETTINGS:
            raise ValueError(f"a video has no setting {name}; known: {', '.join(_SETTINGS)}")
        if name == "subtitles":
            settings[name] = _read_json(value)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        whole = name in _COUNTS
        if not math.isfinite(number) or (whole and not number.is_integer()):
            raise ValueError(f"a video's {name} must be a {'whole ' * whole}number, not {value!r}")
        settings[name] = int(number) if whole else number
    return settings


def _read_json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"a video's subtitles must be JSON: {error}") from None

"""A record with other videos in it, for copies of an archive."""

import json
from collections.abc import Mapping
from typing import Any

from megatron_eagle.data.annotations.dialects import add_named_video
from megatron_eagle.data.annotations.parsing import Conventions, parse_record, read_record
from megatron_eagle.data.annotations.references import References
from megatron_eagle.problems import Problem

_VIDEOS = ("video", "videos", "video_list", "video_url")
_PATHS = ("path", "url", "value")  # in the object of a video


def replace_videos(
    raw: bytes, root: str, replaced: Mapping[str, str], conventions: Conventions | None = None
) -> bytes:
    """A record that `read_sample` reads, with other videos in place of those that `replaced` has as keys.

    Its keys are paths as in `Sample.videos`.  A record in which nothing is replaced stays as it is.
    """
    conventions = conventions or Conventions()
    references = References(root)
    keys = {*_VIDEOS, *(conventions.columns.get(key, key) for key in _VIDEOS)}
    changed = False

    def new(value: str) -> str:
        nonlocal changed
        try:
            found = replaced.get(references.path(value))
        except Problem:
            return value
        changed = changed or found is not None
        return value if found is None else found

    def walk(value: Any, is_video: bool) -> Any:
        if isinstance(value, str):
            return new(value) if is_video else value
        if isinstance(value, list):
            return [walk(item, is_video) for item in value]
        if not isinstance(value, dict):
            return value
        own = is_video or value.get("type") in ("video", "video_url")
        return {key: walk(inner, key in keys or (own and key in _PATHS)) for key, inner in value.items()}

    record = parse_record(raw)
    if read_record(raw, conventions)[1].name == "Video-ChatGPT":
        add_named_video(record, root)
    record = walk(record, False)
    return (json.dumps(record, ensure_ascii=False) + "\n").encode() if changed else raw


def as_line(raw: bytes) -> bytes:
    """An element of an array as a line of its own; one that cannot be read stays so."""
    try:
        return (json.dumps(parse_record(raw), ensure_ascii=False) + "\n").encode()
    except Problem:
        return b" ".join(raw.splitlines()) + b"\n"

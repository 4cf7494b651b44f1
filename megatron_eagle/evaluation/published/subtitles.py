"""Subtitles as benchmarks show them: those that are on the screen at a frame that is shown."""

import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_eagle.data.media.source import open_bytes
from megatron_eagle.data.sample import clock_seconds
from megatron_eagle.hf_model.subtitles import Subtitle
from megatron_eagle.problems import Problem

_SHOWN = re.compile(r"^\s*([\d:]+[.,]?\d*)\s*-->\s*([\d:]+[.,]?\d*)")


def read_subtitle_file(path: str, seconds: float | None = None) -> list[Subtitle]:
    """The subtitles in a file (.srt, .vtt, or JSON of `line` with `start` and `end`, or of `text` with
    `timestamp`), in its order; none if it is not there. `seconds`: the end of one without.

    Raises:
        ValueError: it is no file of subtitles.
    """
    try:
        with open_bytes(path) as file:
            text = file.read().decode("utf-8-sig", errors="replace")
    except (Problem, OSError):
        return []
    if not text.lstrip().startswith("["):
        return _of_text(text)
    try:
        entries = json.loads(text)
        found = [_of_entry(entry, seconds) for entry in entries]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} holds no subtitles: {str(error).splitlines()[0]}") from None
    return [one for one in found if one.text]


def _of_entry(entry: dict[str, Any], seconds: float | None) -> Subtitle:
    if "timestamp" not in entry:
        start, end = (clock_seconds(str(entry[key])) for key in ("start", "end"))
        return Subtitle(start, end, str(entry["line"]).strip())
    start, end = entry["timestamp"]
    if not isinstance(end, float):  # LongVideoBench's authors take the video's end for all but decimals
        end = start + 1 if seconds is None else seconds
    return Subtitle(float(start), float(end), str(entry["text"]).strip())


def _of_text(text: str) -> list[Subtitle]:
    found = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = block.split("\n")
        for number, line in enumerate(lines):
            if shown := _SHOWN.match(line):
                said = " ".join(one.strip() for one in lines[number + 1 :] if one.strip())
                start, end = (clock_seconds(time.replace(",", ".")) for time in shown.groups())
                found.append(Subtitle(start, end, re.sub(r"<[^>]+>|\{[^}]+\}", "", said).strip()))
                break
    return [one for one in found if one.text]


def at_frames(subtitles: Sequence[Subtitle], times: Sequence[float]) -> list[Subtitle]:
    """For each frame the first subtitle that is shown at its time, each subtitle once."""
    found = [next((one for one in subtitles if one.start < time < one.end), None) for time in times]
    return list(dict.fromkeys(one for one in found if one is not None))

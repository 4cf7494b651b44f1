"""Chapters of videos from the JSON files of ViTT and VidChapters.

ViTT: one object a line, `{"id", "annotations": [{"timestamp": milliseconds, "tag"}]}`.  VidChapters: one
object, id -> `{"duration", "chapters": [{"time": seconds, "label"}]}` (or `"chapters": {"0:01:23": title}`),
or its form for dense captioning, id -> `{"duration", "timestamps": [[start, end], ...], "sentences": [...]}`,
the titles.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.data.sample import clock_seconds
from megatron_eagle.eagle_video.records import Notes
from megatron_eagle.errors import UserError
from megatron_eagle.files import split_lines

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".flv")


@dataclass(frozen=True)
class Chapter:
    """A titled part of a video, in seconds from its beginning; `end` None means up to the next or the end."""

    title: str
    start: float
    end: float | None


@dataclass(frozen=True)
class BoundedChapter(Chapter):
    """A chapter with both ends inside its video."""

    end: float


@dataclass(frozen=True)
class ChapteredVideo:
    """A video file and its chapters in order of time."""

    id: str
    path: str
    chapters: tuple[Chapter, ...]


def read_chapters(path: Path, videos: Path, notes: Notes) -> list[ChapteredVideo]:
    """Read a chapter file; a video is `videos`/ID with any usual suffix.

    What is broken or missing goes to `notes`: a video without a file, a second annotation of one, an entry of
    no known form.

    Raises:
        UserError: the file cannot be read.
    """
    found: dict[str, ChapteredVideo] = {}
    for number, (name, entry) in enumerate(_entries(path), 1):
        if name in found:
            notes.add("second annotation", f"{name}; the first is used", number)
            continue
        try:
            chapters = sorted(_chapters(entry), key=lambda chapter: chapter.start)
        except (KeyError, TypeError, ValueError) as error:
            notes.add("unknown chapter form", f"{name}: {type(error).__name__} {error}", number)
            continue
        files = [file for s in VIDEO_SUFFIXES if (file := videos / f"{name}{s}").is_file()]
        if not files:
            notes.add("missing media", f"{videos / name}.*", number)
            continue
        found[name] = ChapteredVideo(name, str(files[0]), tuple(chapters))
    return list(found.values())


def chapters_within(video: ChapteredVideo, duration: float, notes: Notes) -> list[BoundedChapter]:
    """Chapters with both ends inside the video; what has no title or lies beyond the end goes to `notes`."""
    inside = []
    for i, chapter in enumerate(video.chapters):
        following = video.chapters[i + 1].start if i + 1 < len(video.chapters) else duration
        start, end = chapter.start, min(following if chapter.end is None else chapter.end, duration)
        if start >= duration:
            notes.add(
                "chapter beyond the end", f"{video.id}: {start:g} s of {duration:g} s, {chapter.title!r}"
            )
        elif not chapter.title.strip():
            notes.add("chapter without title", f"{video.id}: at {start:g} s")
        elif not 0 <= start < end:
            notes.add("empty chapter", f"{video.id}: {start:g} s to {end:g} s, {chapter.title!r}")
        else:
            inside.append(BoundedChapter(chapter.title.strip(), start, end))
    return inside


def _entries(path: Path) -> list[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this chapter file: {str(error).splitlines()[0]}") from None
    try:
        value = json.loads(text)
        if isinstance(value, dict) and "annotations" in value:  # ViTT with one line
            value = [value]
    except ValueError:
        try:
            value = [json.loads(line) for line in split_lines(text) if line.strip()]
        except ValueError as error:
            raise UserError(f"{path}: neither JSON nor JSON lines: {error}") from None
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in value):
        return [(entry["id"], entry) for entry in value]
    raise UserError(f'{path}: expected an object of videos, or objects with "id" and "annotations"')


def _chapters(entry: Any) -> list[Chapter]:
    if "annotations" in entry:
        return [Chapter(str(a["tag"]), float(a["timestamp"]) / 1000, None) for a in entry["annotations"]]
    if "timestamps" in entry:
        pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
        return [Chapter(str(title), float(start), float(end)) for (start, end), title in pairs]
    chapters = entry["chapters"]
    if isinstance(chapters, dict):
        return [Chapter(str(title), clock_seconds(str(time)), None) for time, title in chapters.items()]
    return [Chapter(str(c["label"]), float(c["time"]), None) for c in chapters]

"""Every input dialect, one JSON line at a time, into the canonical sample.

Dialects: Eagle/LLaVA `conversations` with `image`, `video`, `document` or `data`; ShareGPT with `images` /
`videos`; OpenAI/Qwen `messages` whose content is text or a list of typed parts.  A placeholder stands for one
picture, video or document, which is used exactly once; in an answer it is plain text.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from megatron_eagle.data.media.source import database_picture
from megatron_eagle.data.sample import (
    ASSISTANT,
    OBSERVATION,
    SYSTEM,
    USER,
    Document,
    DocumentRef,
    ImageRef,
    Part,
    Sample,
    Turn,
    VideoRef,
    VideoSource,
)
from megatron_eagle.problems import Problem

# Kinds of problems that follow from the annotation and the settings alone, whatever becomes of the media.
TEXT_PROBLEMS = frozenset(
    ("empty line", "broken text", "broken JSON", "not a record", "unknown format", "unknown role", "bad turn")
    + ("no answer", "empty answer", "too many answers", "bad setting", "bad media reference", "bad clip")
    + ("empty clip", "placeholder mismatch", "unsupported media", "too long")
)
OVERRIDES = ("fps", "min_frames", "max_frames", "max_tiles")
_ROLES = {"human": USER, "gpt": ASSISTANT, USER: USER, ASSISTANT: ASSISTANT, SYSTEM: SYSTEM}
_ROLES[OBSERVATION] = OBSERVATION
_REFERENCES: dict[str, Callable[[int], Part]] = {
    "image": ImageRef,
    "video": VideoRef,
    "document": DocumentRef,
}
_PLACEHOLDER = re.compile(r"<(image|video|document)(?:-([0-9]+))?>")
_MAX_ANSWERS = 65535  # the store keeps a token's answer number in 16 bits


@dataclass(frozen=True)
class _Placeholder:
    """`<image>` / `<image-i>`, likewise video and document, as written; `number` is 1-based, or None."""

    kind: str
    number: int | None


_RawPart = Part | _Placeholder


@dataclass
class _Media:
    """The media of a record, in the order in which it names them."""

    images: list[str] = field(default_factory=list)
    videos: list[VideoSource] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many there are, by what a placeholder calls them."""
        return {"image": len(self.images), "video": len(self.videos), "document": len(self.documents)}


def read_sample(
    raw: bytes, *, root: str, file: str, line: int, overrides: Mapping[str, Any] | None = None
) -> Sample:
    """Read one line of an annotation file.

    `root` is what media paths are relative to, `overrides` the sampling settings of the whole file.
    Raises `Problem` for anything that cannot be used as it is.
    """
    record = _parse(raw)
    media = _record_media(record, root)
    turns = _read_turns(record, root, media)
    answers = [parts for role, parts in turns if role == ASSISTANT]
    if not answers or len(answers) > _MAX_ANSWERS:
        raise Problem("no answer" if not answers else "too many answers", f"{len(answers)} assistant turns")
    if not all(answers):
        raise Problem("empty answer", "an assistant turn has no text")
    return Sample(
        turns=tuple(Turn(role, _resolved(parts)) for role, parts in turns),
        images=tuple(media.images),
        videos=tuple(media.videos),
        documents=tuple(media.documents),
        file=file,
        line=line,
        overrides={**(overrides or {}), **read_overrides(record)},
    )


def read_overrides(record: Mapping[str, Any]) -> dict[str, float]:
    """Sampling settings given with a sample or a data set.  Raises `Problem` for no positive number."""
    found = {key: record[key] for key in OVERRIDES if record.get(key) is not None}
    if record.get("max_dynamic_tiles") is not None:
        found["max_tiles"] = record["max_dynamic_tiles"]
    for key, value in found.items():
        types = (int, float) if key == "fps" else (int,)
        if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < 1e9:
            raise Problem("bad setting", f"{key} must be a positive number, not {value!r}")
    return found


def replace_videos(raw: bytes, root: str, replaced: Mapping[str, str]) -> bytes:
    """A line that `read_sample` can read, with other videos in place of those that `replaced` has as keys.

    Its keys are paths as in `Sample.videos`.  A line in which nothing is replaced stays as it is.
    """
    record = _parse(raw)
    changed = False

    def other(item: object) -> object:
        nonlocal changed
        if isinstance(item, list):
            return [other(one) for one in item]
        if isinstance(item, dict):
            key = "video" if "video" in item else "path"
            return {**item, key: other(item[key])}
        new = replaced.get(_path(item, root))
        changed = changed or new is not None
        return item if new is None else new

    for key in ("video", "videos"):
        if record.get(key) is not None:
            record[key] = other(record[key])
    for item in _as_list(record.get("data")):
        if item.get("video_list") is not None:
            item["video_list"] = other(item["video_list"])
    for message in record["messages"] if "messages" in record else record["conversations"]:
        content = message.get("value", message.get("content"))
        for part in content if isinstance(content, list) else ():
            named = isinstance(part, dict) and part.get("type") == "video"
            if named and part.get("video", part.get("path")) is not None:
                part.update(other(part))
    return (json.dumps(record, ensure_ascii=False) + "\n").encode() if changed else raw


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise Problem("empty line")
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Problem("broken text", f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise Problem("broken JSON", str(error)) from None
    if not isinstance(record, dict):
        raise Problem("not a record", f"a line must hold one JSON object, not {type(record).__name__}")
    return record


def _record_media(record: dict[str, Any], root: str) -> _Media:
    """Media named beside the text, under any of the dialects' keys."""
    images = _as_list(record.get("image")) + _as_list(record.get("images"))
    if "lmdb_file" in record or "lmdb_key" in record:
        images.append({key: record.get(key) for key in ("lmdb_file", "lmdb_key")})
    videos = _as_list(record.get("video")) + _as_list(record.get("videos"))
    for item in _as_list(record.get("data")):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "image":
            images += _as_list(item.get("image_list"))
        elif kind == "video":
            videos += _as_list(item.get("video_list"))
        elif kind != "text":
            raise Problem("unsupported media", f"data item of type {kind!r}")
    return _Media(
        [_image_path(item, root) for item in images],
        [_video_source(item, root) for item in videos],
        _documents(record, root),
    )


def _read_turns(record: dict[str, Any], root: str, media: _Media) -> list[tuple[str, list[_RawPart]]]:
    """Turns with every placeholder resolved; media that typed parts bring along are added to `media`."""
    key = next((key for key in ("messages", "conversations") if key in record), None)
    if key is None:
        raise Problem("unknown format", 'a record needs "conversations" or "messages"')
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise Problem("bad turn", f'"{key}" must be a list of turns')
    listed = media.counts()
    # In `messages` without media of their own beside them, text is text: pictures come as typed parts.  And
    # <document> is a tag that people write; it means one only where there is one.
    kinds = {"image", "video"} if key == "conversations" or any(listed.values()) else set()
    kinds |= {"document"} if listed["document"] else set()
    turns: list[tuple[str, list[_RawPart]]] = []
    for number, message in enumerate(messages, 1):
        role, content = _role_and_content(message, number)
        parts: list[_RawPart] = []
        for item in content if isinstance(content, list) else [content]:
            if isinstance(item, str):
                parts += _split(_text(item), set() if role in (SYSTEM, ASSISTANT) else kinds)
            else:
                parts.append(_typed_part(item, root, media))
        if role in (SYSTEM, ASSISTANT):
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise Problem("bad turn", f"turn {number} ({role}) holds media")
            parts = ["".join(texts)]
        turns.append((role, _strip(parts)))
    system = record.get("system")
    if isinstance(system, str) and system.strip() and turns[0][0] != SYSTEM:
        turns.insert(0, (SYSTEM, [_text(system.strip())]))
    _resolve(turns, listed)
    return turns


def _role_and_content(message: object, number: int) -> tuple[str, str | list[Any]]:
    if not isinstance(message, dict):
        raise Problem("bad turn", f"turn {number} must be an object, not {type(message).__name__}")
    name = message.get("from", message.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Problem("unknown role", f"{name!r} in turn {number}; known are {', '.join(_ROLES)}")
    content = message.get("value", message.get("content"))
    if not isinstance(content, str | list):
        raise Problem("bad turn", f"turn {number} ({role}) has no text")
    return role, content


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Problem("broken text", "half of a surrogate pair") from None
    return value


def _split(text: str, kinds: set[str]) -> list[_RawPart]:
    """Cut text at its placeholders of these kinds."""
    parts: list[_RawPart] = []
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        if match[1] not in kinds:
            continue
        parts += [text[end : match.start()], _Placeholder(match[1], int(match[2]) if match[2] else None)]
        end = match.end()
    return [*parts, text[end:]]


def _typed_part(item: Any, root: str, media: _Media) -> _RawPart:
    """One part of a content list; media that it names are added to `media`."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return _text(item["text"])
    if kind in ("image", "image_url"):
        value = item.get(kind, item.get("path"))
        if value is None:  # stands for the next one listed beside the text
            return _Placeholder("image", None)
        media.images.append(_image_path(value, root))
        return ImageRef(len(media.images) - 1)
    if kind == "video":
        if item.get("video", item.get("path")) is None:
            return _Placeholder("video", None)
        media.videos.append(_video_source(item, root))
        return VideoRef(len(media.videos) - 1)
    if kind == "document":
        value = item.get("document", item.get("path"))
        if value is None:
            return _Placeholder("document", None)
        media.documents.append(_document(value, root))
        return DocumentRef(len(media.documents) - 1)
    raise Problem("bad turn", f"content part of type {kind!r}")


def _resolve(turns: list[tuple[str, list[_RawPart]]], listed: dict[str, int]) -> None:
    """Replace every placeholder by a reference; media without one go to the start of the first user turn."""
    missing: list[Part] = []
    for kind, reference in _REFERENCES.items():
        written = [p for _, parts in turns for p in parts if isinstance(p, _Placeholder) and p.kind == kind]
        numbers = [p.number for p in written if p.number is not None]
        for number in numbers:
            if not 1 <= number <= listed[kind] or numbers.count(number) > 1:
                why = (
                    "is used twice" if numbers.count(number) > 1 else f"but there are {listed[kind]} {kind}s"
                )
                raise Problem("placeholder mismatch", f"<{kind}-{number}> {why}")
        free = [i for i in range(listed[kind]) if i + 1 not in numbers]
        if len(written) - len(numbers) > len(free):
            raise Problem("placeholder mismatch", f"{len(written)} <{kind}> for {listed[kind]} {kind}s")
        for _, parts in turns:
            for i, part in enumerate(parts):
                if isinstance(part, _Placeholder) and part.kind == kind:
                    parts[i] = reference(free.pop(0) if part.number is None else part.number - 1)
        missing += map(reference, free)
    if missing:
        first = next((parts for role, parts in turns if role == USER), None)
        if first is None:
            raise Problem("placeholder mismatch", "media, but no user turn to show them in")
        first[:0] = missing


def _resolved(parts: list[_RawPart]) -> tuple[Part, ...]:
    """Parts of a turn that has no placeholder any more."""
    return tuple(part for part in parts if not isinstance(part, _Placeholder))


def _strip(parts: list[_RawPart]) -> list[_RawPart]:
    """A turn's content without white space at its two ends and without empty parts."""
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part for part in parts if part != ""]


def _as_list(value: object) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _documents(record: dict[str, Any], root: str) -> list[Document]:
    """The documents beside the text: `document` is one, or a list of such; `documents` is a list."""
    one = record.get("document")
    several = isinstance(one, list) and one and all(isinstance(item, list) or _is_pdf(item) for item in one)
    found = [] if one is None else one if several else [one]
    return [_document(item, root) for item in [*found, *_as_list(record.get("documents"))]]


def _is_pdf(item: object) -> bool:
    return isinstance(item, str) and item.lower().endswith(".pdf")


def _document(item: object, root: str) -> Document:
    """One document: a PDF file, known by its suffix, or the pictures of its pages."""
    if _is_pdf(item):
        return _path(item, root)
    pages = _as_list(item)
    if not pages or any(map(_is_pdf, pages)):
        raise Problem(
            "bad media reference", f"a document is one PDF file or a list of page images, not {item!r}"
        )
    return tuple(_image_path(page, root) for page in pages)


def _image_path(item: object, root: str) -> str:
    if isinstance(item, dict):
        if "lmdb_file" in item or "lmdb_key" in item:
            key = item.get("lmdb_key")
            if not isinstance(key, str) or not key:
                raise Problem("bad media reference", f"lmdb_key must be a text, not {key!r}")
            return database_picture(_path(item.get("lmdb_file"), root), _text(key))
        item = item.get("image", item.get("path", item.get("url")))
    return _path(item, root)


def _video_source(item: object, root: str) -> VideoSource:
    if not isinstance(item, dict):
        return VideoSource(_path(item, root))
    if "lmdb_file" in item or "lmdb_key" in item:
        raise Problem("unsupported media", "videos in lmdb files are not read; unpack them")
    start, end = (_seconds(item, f"{key}_time", key, f"video_{key}") for key in ("start", "end"))
    if start is not None and end is not None and start >= end:
        raise Problem("empty clip", f"start {float(start):g} s is not before end {float(end):g} s")
    return VideoSource(_path(item.get("video", item.get("path")), root), start, end)


def _seconds(item: dict[str, Any], *keys: str) -> Fraction | None:
    value = next((item[key] for key in keys if item.get(key) is not None), None)
    if value is None:
        return None
    try:
        if abs(float(value)) < 1e9:  # also leaves out what is infinite or not a number
            # By its decimal digits: 0.1 must mean a tenth, or a frame at exactly that time would be lost.
            return Fraction(str(value))
    except (TypeError, ValueError):
        pass
    raise Problem("bad clip", f"{keys[0]} must be seconds, not {value!r}")


def _path(value: object, root: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Problem("bad media reference", f"expected a file name, not {value!r}")
    value = value.removeprefix("file://")
    if "://" in value or value.startswith("data:"):
        raise Problem("unsupported media", f"{value[:60]} is no local file")
    return os.path.normpath(os.path.join(root, _text(value)))

"""One record of any dialect into the canonical sample.

`parsing` and `dialects` make messages of it and see to it that no key is passed over, `references` reads what
it says of its media.  A placeholder stands for one picture, video or document, which is used exactly once; in
an answer it is plain text.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from megatron_eagle.data.annotations.dialects import Dialect, add_named_video
from megatron_eagle.data.annotations.keys import OF_VIDEOS, UNKNOWN_KEY, UNSUPPORTED_KEY, is_learned, present
from megatron_eagle.data.annotations.parsing import Conventions, check_keys, content_of, read_record
from megatron_eagle.data.annotations.references import RecordMedia, References, sample_overrides, whole_text
from megatron_eagle.data.sample import (
    ASSISTANT,
    OBSERVATION,
    SYSTEM,
    USER,
    DocumentRef,
    ImageRef,
    Part,
    Sample,
    Turn,
    VideoRef,
)
from megatron_eagle.problems import Problem

# Kinds of problems that follow from the annotation and the settings alone, whatever becomes of the media.
TEXT_PROBLEMS = frozenset(
    ("empty line", "broken text", "broken JSON", "not a record", "unknown format", "unknown role", "bad turn")
    + ("no answer", "empty answer", "too many answers", "nothing to learn", "bad setting", "bad clip")
    + ("bad media reference", "empty clip", "placeholder mismatch", "unsupported media", "too long")
    + (UNKNOWN_KEY, UNSUPPORTED_KEY)
)
_ROLES = {"human": USER, "gpt": ASSISTANT, USER: USER, ASSISTANT: ASSISTANT, SYSTEM: SYSTEM}
_ROLES |= {"model": ASSISTANT, "function_call": ASSISTANT, "tool_call": ASSISTANT, "developer": SYSTEM}
_ROLES |= {OBSERVATION: OBSERVATION, "tool": OBSERVATION, "function": OBSERVATION}
_ROLES |= {"function_response": OBSERVATION, "tool_response": OBSERVATION}
_REFERENCES: dict[str, Callable[[int], Part]] = {
    "image": ImageRef,
    "video": VideoRef,
    "document": DocumentRef,
}
_PLACEHOLDER = re.compile(r"<(image|video|document)(?:-([0-9]+))?>")
_DATABASE = ("lmdb_file", "lmdb_key")
_TEXTS = ("text", "input_text", "output_text")
_NAMES = {"input_text": "text", "output_text": "text"}  # of a part's type
_NAMES |= {"image_url": "image", "input_image": "image", "video_url": "video"}
_MAX_ANSWERS = 65535  # the store keeps a token's answer number in 16 bits


@dataclass(frozen=True)
class _Placeholder:
    """`<image>` / `<image-i>`, likewise video and document, as written; `number` is 1-based, or None.

    It may also be `typed`: a part of that type that names no medium.
    """

    kind: str
    number: int | None
    typed: bool = False


_RawPart = Part | _Placeholder


@dataclass
class _RawTurn:
    role: str
    parts: list[_RawPart]
    learned: bool = True


def read_sample(
    raw: bytes,
    *,
    root: str,
    file: str,
    line: int,
    overrides: Mapping[str, float] | None = None,
    conventions: Conventions | None = None,
) -> Sample:
    """Read one record of an annotation file.

    Args:
        raw: the record's bytes.
        root: what media paths are relative to.
        file: where it comes from, with `line`, its number from 1.
        overrides: the sampling settings of the whole file.
        conventions: what the recipe says of how the file is written.

    Raises:
        Problem: for anything that cannot be used as it is.
    """
    conventions = conventions or Conventions()
    record, dialect = read_record(raw, conventions)
    if dialect.name == "Video-ChatGPT":
        add_named_video(record, root)
    check_keys(record, dialect, conventions).check()
    references = References(root, conventions.frames_fps)
    media = references.of_record(record)
    turns = _read_turns(record, dialect, references, media)
    _check_answers(turns, record)
    return Sample(
        turns=tuple(Turn(turn.role, tuple(cast("list[Part]", turn.parts)), turn.learned) for turn in turns),
        images=tuple(media.images),
        videos=tuple(media.videos),
        documents=tuple(media.documents),
        file=file,
        line=line,
        overrides={**(overrides or {}), **sample_overrides(record, media)},
    )


def _check_answers(turns: list[_RawTurn], record: Mapping[str, Any]) -> None:
    answers = [turn for turn in turns if turn.role == ASSISTANT]
    if not answers or len(answers) > _MAX_ANSWERS:
        raise Problem("no answer" if not answers else "too many answers", f"{len(answers)} assistant turns")
    if not all(turn.parts for turn in answers):
        raise Problem("empty answer", "an assistant turn has no text")
    if is_learned(record, "the record") is False or not any(turn.learned for turn in answers):
        raise Problem("nothing to learn", "the loss of every answer is switched off")


def _read_turns(
    record: Mapping[str, Any], dialect: Dialect, references: References, media: RecordMedia
) -> list[_RawTurn]:
    """Turns with every placeholder resolved; media that typed parts bring along are added to `media`."""
    messages = dialect.messages(record)
    roles = [_role(message, number) for number, message in enumerate(messages, 1)]
    listed = media.counts()
    # In `messages` without media of their own beside them, text is text: pictures come as typed parts.  And
    # <document> is a tag that people write; it means one only where there is one.
    kinds = {"image", "video"} if dialect.name != "messages" or any(listed.values()) else set()
    kinds |= {"document"} if listed["document"] else set()
    # Where nobody asks, what is shown stands in the answer.
    alone = USER not in roles
    turns: list[_RawTurn] = []
    for number, (role, message) in enumerate(zip(roles, messages, strict=True), 1):
        content = content_of(message)
        if isinstance(content, dict):
            content = [content]
        if not isinstance(content, str | list):
            raise Problem("bad turn", f"turn {number} ({role}) has no text")
        if role == ASSISTANT and alone:
            shown = {kind for kind in kinds if listed[kind] or (kind == "image" and listed["video"])}
        else:
            shown = set() if role in (SYSTEM, ASSISTANT) else kinds
        parts: list[_RawPart] = []
        for item in content if isinstance(content, list) else [content]:
            if isinstance(item, str):
                parts += _split(whole_text(item), shown)
            else:
                parts.append(_typed_part(item, references, media))
        learned = is_learned(message, f"turn {number}")
        if role != ASSISTANT and learned:
            raise Problem(UNSUPPORTED_KEY, f"turn {number} ({role}) is to be learned; only answers are")
        if role in (SYSTEM, ASSISTANT):
            if alone and role == ASSISTANT:
                first = _leading_media(parts)
                if first:
                    turns.append(_RawTurn(USER, first))
            if not all(isinstance(part, str) for part in parts):
                raise Problem("bad turn", f"turn {number} ({role}) holds media")
            parts = ["".join(str(part) for part in parts)]
        turns.append(_RawTurn(role, _strip(parts), learned is not False))
    _add_system(turns, record)
    _resolve(turns, listed)
    return turns


def _role(message: object, number: int) -> str:
    if not isinstance(message, dict):
        raise Problem("bad turn", f"turn {number} must be an object, not {type(message).__name__}")
    name = message.get("from", message.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Problem("unknown role", f"{name!r} in turn {number}; known are {', '.join(_ROLES)}")
    return role


def _add_system(turns: list[_RawTurn], record: Mapping[str, Any]) -> None:
    """Put the record's own system prompt, a text or a list of texts, before its turns."""
    system = record.get("system")
    items = system if isinstance(system, list) else [] if system is None else [system]
    given = [item.get("text") if isinstance(item, dict) else item for item in items]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise Problem("bad turn", '"system" holds something else than text')
    prompt = whole_text("".join(texts).strip())
    if not prompt:
        return
    if turns and turns[0].role == SYSTEM:
        if turns[0].parts != [prompt]:
            raise Problem(UNSUPPORTED_KEY, '"system" of a record that begins with another system turn')
        return
    turns.insert(0, _RawTurn(SYSTEM, [prompt]))


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


def _leading_media(parts: list[_RawPart]) -> list[_RawPart]:
    """Take the media from the beginning of an answer that nobody asked for."""
    first: list[_RawPart] = []
    while parts and (not isinstance(parts[0], str) or not parts[0].strip()):
        part = parts.pop(0)
        if not isinstance(part, str):
            first.append(part)
    return first


def _typed_part(item: object, references: References, media: RecordMedia) -> _RawPart:
    """One part of a content list; media that it names are added to `media`."""
    part: Mapping[str, Any] = present(item) if isinstance(item, dict) else {}
    kind = part.get("type")
    if kind is None:  # told by the key that is there
        kind = next((key for key in (*_TEXTS, *_REFERENCES, "image_url", "video_url") if key in part), None)
    name = _NAMES.get(str(kind), str(kind))
    _check_part(part, name)
    if kind in _TEXTS:
        text = part.get("text", part.get(kind, part.get("value")))
        if isinstance(text, str):
            return whole_text(text)
    if name in _REFERENCES:
        keys = (str(kind), name, f"{name}_url", "path", "url", "value")
        stored = {key: part[key] for key in _DATABASE if key in part}
        named: list[Any] = [part[key] for key in keys if key in part]
        value: object = stored or (named[0] if named else None)
        if value is None:  # stands for the next one listed beside the text
            if said := [key for key in part if key in OF_VIDEOS]:
                raise Problem(UNSUPPORTED_KEY, f'"{said[0]}" of a part that names no medium itself')
            return _Placeholder(name, None, typed=True)
        if name == "image":
            media.images.append(references.image(value))
            return ImageRef(len(media.images) - 1)
        if name == "document":
            media.documents.append(references.document(value))
            return DocumentRef(len(media.documents) - 1)
        inner = value if isinstance(value, dict) else {"video": value}
        own = {key: one for key, one in {**part, **inner}.items() if key not in ("path", "url")}
        own["video"] = inner.get("video", inner.get("url", inner.get("path")))
        media.add_video(references.video(own, own), own)
        return VideoRef(len(media.videos) - 1)
    raise Problem("bad turn", f"content part of type {kind!r}")


def _check_part(part: Mapping[str, Any], name: str) -> None:
    """Refuse keys that a part of a type does not use.

    Raises:
        Problem: there are such keys.
    """
    said = [key for key in (*_TEXTS, *_REFERENCES, *_NAMES) if key in part and _NAMES.get(key, key) != name]
    said = [key for key in said if part[key] not in ("", [])]
    if name != "video":
        said += [key for key in part if key in OF_VIDEOS]
    if name != "image":
        said += [key for key in part if key in _DATABASE]
    if said:
        raise Problem(UNSUPPORTED_KEY, f'"{said[0]}" of a part whose type is {name}')


def _resolve(turns: list[_RawTurn], listed: dict[str, int]) -> None:
    """Replace every placeholder by a reference; media without one go to the start of the first user turn."""
    placeholders = [part for turn in turns for part in turn.parts if isinstance(part, _Placeholder)]
    kinds = {(part.kind, part.typed) for part in placeholders}
    if listed["video"] and not listed["image"] and kinds == {("image", False)}:
        _rename(turns, "image", "video")  # LLaVA-Video writes <image> for its videos
    missing: list[Part] = []
    for kind, reference in _REFERENCES.items():
        written = [p for turn in turns for p in turn.parts if isinstance(p, _Placeholder) and p.kind == kind]
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
        for turn in turns:
            for i, part in enumerate(turn.parts):
                if isinstance(part, _Placeholder) and part.kind == kind:
                    turn.parts[i] = reference(free.pop(0) if part.number is None else part.number - 1)
        missing += map(reference, free)
    if missing:
        _first_user_turn(turns).parts[:0] = missing


def _rename(turns: list[_RawTurn], kind: str, other: str) -> None:
    for turn in turns:
        turn.parts = [
            _Placeholder(other, part.number) if isinstance(part, _Placeholder) and part.kind == kind else part
            for part in turn.parts
        ]


def _first_user_turn(turns: list[_RawTurn]) -> _RawTurn:
    """The first user turn; where there is none, a new one before the first answer."""
    found = next((turn for turn in turns if turn.role == USER), None)
    if found is None:
        found = _RawTurn(USER, [])
        place = next((i for i, turn in enumerate(turns) if turn.role == ASSISTANT), len(turns))
        turns.insert(place, found)
    return found


def _strip(parts: list[_RawPart]) -> list[_RawPart]:
    """A turn's content without white space at its two ends and without empty parts."""
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part for part in parts if part != ""]

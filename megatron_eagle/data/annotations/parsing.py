"""One record as its dialect knows it: parsed, under the names that the recipe gives, every key looked at."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.data.annotations.dialects import Dialect, tell
from megatron_eagle.data.annotations.keys import Keys, present
from megatron_eagle.data.sample import ASSISTANT, OBSERVATION, SYSTEM, USER
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class Conventions:
    """What a recipe says of how the records of a data set are written.

    Attributes:
        ignore: keys that are as if they were not there.
        columns: by the name that `dialects` knows, the name that a record uses.
        tags: likewise the names of a turn's keys and of roles, as LLaMA-Factory's `dataset_info.json` gives
            them.
        frames_fps: the rate of frames that are given one by one and say nothing of it.
    """

    ignore: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    frames_fps: float | None = None


def read_record(raw: bytes, conventions: Conventions) -> tuple[dict[str, Any], Dialect]:
    """A record under the names of keys that `dialects` knows, without its nulls, and its dialect.

    Raises:
        Problem: it is no JSON object, no dialect knows it, or it has a key both under its own name and under
            the one that `conventions` give it.
    """
    record = present(parse_record(raw))
    if conventions.ignore:
        record = _without(record, conventions.ignore)
    for name, column in conventions.columns.items():
        if column in record and column != name:
            if name in record:
                raise Problem("bad setting", f'"{column}" is to be read as "{name}", which is there too')
            record[name] = record.pop(column)
    dialect = tell(record)
    if conventions.tags and dialect.turns and isinstance(record[dialect.turns], list):
        record[dialect.turns] = [_renamed(turn, conventions.tags) for turn in record[dialect.turns]]
    return record, dialect


def check_keys(record: Mapping[str, Any], dialect: Dialect, conventions: Conventions) -> Keys:
    """What is refused and what is unknown of a record's keys, in all places."""
    keys = Keys(dialect.keys, conventions.ignore)
    keys.look(record, "record")
    for name in ("image", "images", "video", "videos", "document", "documents", "data"):
        keys.look_at_all(record.get(name), "medium")
    for item in _list(record.get("data")):
        for name in ("image_list", "video_list") if isinstance(item, dict) else ():
            keys.look_at_all(item.get(name), "medium")
    turns = record.get(dialect.turns) if dialect.turns else None
    if dialect.name == "prompt/completion":
        turns = [turn for name in ("prompt", "completion") for turn in _list(record[name])]
    for turn in _list(turns):
        if isinstance(turn, dict):
            keys.look(turn, "turn")
            for part in _list(content_of(turn)):
                if isinstance(part, dict):
                    keys.look(part, "part")
                    for name in ("image", "video", "image_url", "video_url"):
                        keys.look_at_all(part.get(name), "medium")
    return keys


def parse_record(raw: bytes) -> dict[str, Any]:
    """The JSON object of a record.

    Raises:
        Problem: it is not JSON, or no object.
    """
    if not raw.strip():
        raise Problem("empty line")
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Problem("broken text", f"not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise Problem("broken JSON", str(error)) from None
    if not isinstance(record, dict):
        raise Problem("not a record", f"a record is one JSON object, not {type(record).__name__}")
    return record


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _without(value: Any, ignore: Sequence[str]) -> Any:
    """A value without the keys that are to be ignored, however deep."""
    if isinstance(value, dict):
        return {key: _without(inner, ignore) for key, inner in value.items() if key not in ignore}
    return [_without(inner, ignore) for inner in value] if isinstance(value, list) else value


def _renamed(turn: object, tags: Mapping[str, str]) -> object:
    """A turn whose keys and role have other names."""
    if not isinstance(turn, dict):
        return turn
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    names = {role: "role", content: "content"}
    turn = {names.get(key, key): value for key, value in turn.items()}
    roles = {
        USER: USER,
        ASSISTANT: ASSISTANT,
        SYSTEM: SYSTEM,
        OBSERVATION: OBSERVATION,
        "function": "function_call",
    }
    known = {tags[f"{name}_tag"]: ours for name, ours in roles.items() if f"{name}_tag" in tags}
    if isinstance(turn.get("role"), str):
        turn["role"] = known.get(turn["role"], turn["role"])
    return turn


def content_of(message: Mapping[str, Any]) -> object:
    """What a turn says: a text or a list of parts."""
    return next((message[key] for key in ("value", "content") if message.get(key) is not None), None)

"""The dialects of annotations in one table: how each is told, and which keys of it are used.

A dialect turns its record into messages, `{"role": ..., "content": ...}` with the switches of their loss;
what it shares with the others (media beside the text, clips, settings, `system`) is read by `formats`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_eagle.data.annotations.keys import SWITCHES
from megatron_eagle.data.annotations.roots import open_root
from megatron_eagle.problems import Problem

Record = Mapping[str, Any]
Message = dict[str, Any]
_MEDIA = ("image", "images", "video", "videos")
_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")


@dataclass(frozen=True)
class Dialect:
    """One way to write a conversation.

    Attributes:
        told_by: what tells it, in words.
        tells: that test.
        messages: makes its messages of a record.
        keys: those that it uses, by place, beside those that all do.
        turns: the key of its list of turns, if it has one.
    """

    name: str
    told_by: str
    tells: Callable[[Record], bool]
    messages: Callable[[Record], list[Message]]
    keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    turns: str = ""
    becomes: str = ""
    """What its keys become, in words."""


def _message(role: str, content: object, source: Record | None = None) -> Message:
    """A message; an answer has the switches of the object it comes from."""
    switches = {key: source[key] for key in SWITCHES if key in source} if source else {}
    return {"role": role, "content": content, **switches}


def _listed(key: str) -> Callable[[Record], list[Message]]:
    def messages(record: Record) -> list[Message]:
        turns = record[key]
        if not isinstance(turns, list) or not turns:
            raise Problem("bad turn", f'"{key}" must be a list of turns')
        return turns

    return messages


def _pairs(key: str, question: Iterable[str], answer: Iterable[str]) -> Callable[[Record], list[Message]]:
    """Messages of a list of objects with a question and an answer each, under the first key that is there."""

    def messages(record: Record) -> list[Message]:
        found = []
        for number, pair in enumerate(_listed(key)(record), 1):
            if not isinstance(pair, dict):
                raise Problem("bad turn", f"turn {number} must be an object, not {type(pair).__name__}")
            if pair.get("system"):
                found.append(_message("system", pair["system"]))
            asked = next((pair[name] for name in question if pair.get(name) is not None), None)
            given = next((pair[name] for name in answer if pair.get(name) is not None), None)
            if asked is not None:
                found.append(_message("user", asked))
            found.append(_message("assistant", given, pair))
        return found

    return messages


def _history(record: Record) -> list[Message]:
    found = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Problem("bad turn", '"history" must be a list of [question, answer]')
        found += [_message("user", pair[0]), _message("assistant", pair[1])]
    return found


def _one_pair(question: str, answer: str) -> Callable[[Record], list[Message]]:
    def messages(record: Record) -> list[Message]:
        asked = [_message("user", record[question])] if record.get(question) is not None else []
        return [*_history(record), *asked, _message("assistant", record[answer])]

    return messages


def _alpaca(record: Record) -> list[Message]:
    asked = [record[key] for key in ("instruction", "input") if record.get(key)]
    if not all(isinstance(text, str) for text in asked):
        raise Problem("bad turn", '"instruction" and "input" must be texts')
    return [*_history(record), _message("user", "\n".join(asked)), _message("assistant", record["output"])]


def _prompt(record: Record) -> list[Message]:
    """`prompt` and `completion`: texts, or lists of messages."""
    found: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        found += value if isinstance(value, list) else [_message(role, value)]
    return found


def _video_chat(record: Record) -> list[Message]:
    """`QA`: an instruction `i` comes before the first question that it is given with."""
    found: list[Message] = []
    before = None
    for number, pair in enumerate(_listed("QA")(record), 1):
        if not isinstance(pair, dict) or not isinstance(pair.get("q", ""), str):
            raise Problem("bad turn", f"turn {number} needs a question q and an answer a")
        instruction = pair.get("i") or None
        asked = [text for text in (instruction if instruction != before else None, pair.get("q")) if text]
        if not all(isinstance(text, str) for text in asked):
            raise Problem("bad turn", f"the instruction of turn {number} must be a text")
        before = instruction
        found += [_message("user", "\n".join(asked)), _message("assistant", pair.get("a"), pair)]
    return found


def _caption(record: Record) -> list[Message]:
    key = "caption" if "caption" in record else "text"
    return [_message("assistant", record[key])]


def _has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: all(key in record for key in keys)


def _of(
    record: Iterable[str] = (), turn: Iterable[str] = (), part: Iterable[str] = ()
) -> dict[str, frozenset[str]]:
    return {"record": frozenset(record), "turn": frozenset(turn), "part": frozenset(part)}


_TURN = ("from", "role", "value", "content")
_BECOMES = "each turn by its role; tool calls are answers, tool results are observations"


def _conversations(name: str, told_by: str, tells: Callable[[Record], bool], becomes: str = "") -> Dialect:
    keys, messages = _of(["conversations"], _TURN), _listed("conversations")
    return Dialect(name, told_by, tells, messages, keys, "conversations", f"{_BECOMES}{becomes}")


DIALECTS = (
    Dialect(
        "messages",
        "`messages` (OpenAI, Qwen, ms-swift)",
        _has("messages"),
        _listed("messages"),
        _of(["messages"], _TURN),
        "messages",
        f"{_BECOMES}; a content list's parts in their order",
    ),
    _conversations(
        "Eagle",
        "`conversations` and `data`",
        _has("conversations", "data"),
        "; `data` lists the media",
    ),
    _conversations(
        "LLaVA",
        "`conversations` and `image`, `video` or `document`",
        lambda record: (
            "conversations" in record and bool({"image", "video", "document", "lmdb_key"} & record.keys())
        ),
        "; `<image>` stands for a video where there are only videos",
    ),
    _conversations(
        "ShareGPT",
        "`conversations`, with `images` and `videos` or without media",
        _has("conversations"),
    ),
    Dialect(
        "conversation pairs",
        "`conversation` (ms-swift, XTuner)",
        _has("conversation"),
        _pairs("conversation", ("human", "input", "user"), ("assistant", "output")),
        _of(["conversation"], ("system", "human", "assistant", "input", "output", "user")),
        "conversation",
        "`human` or `input` is asked, `assistant` or `output` learned",
    ),
    Dialect(
        "texts",
        "`texts` (FineVision, The Cauldron)",
        _has("texts"),
        _pairs("texts", ("user",), ("assistant",)),
        _of(["texts"], ("user", "assistant")),
        "texts",
        "`user` is asked, `assistant` learned",
    ),
    Dialect(
        "query/response",
        "`query` and `response` (ms-swift)",
        _has("query", "response"),
        _one_pair("query", "response"),
        _of(("query", "response", "history")),
        becomes="`history` comes before; its answers are learned too",
    ),
    Dialect(
        "alpaca",
        "`instruction` and `output` (LLaMA-Factory)",
        _has("instruction", "output"),
        _alpaca,
        _of(("instruction", "input", "output", "history")),
        becomes="`instruction`, a line end and `input` are asked; `history` comes before",
    ),
    Dialect(
        "VideoChat2",
        "`QA`",
        _has("QA"),
        _video_chat,
        _of(["QA"], ("i", "q", "a")),
        "QA",
        "an instruction `i` comes before the first question `q` that has it; `a` is learned",
    ),
    Dialect(
        "Video-ChatGPT",
        "`q` and `a`",
        _has("q", "a"),
        _one_pair("q", "a"),
        _of(("q", "a", "video_id")),
        becomes="`video_id` names a file below `root`, whatever its suffix, where no `video` does",
    ),
    Dialect(
        "question/answer",
        "`question` and `answer`",
        _has("question", "answer"),
        _one_pair("question", "answer"),
        _of(("question", "answer")),
        becomes="`question` is asked, `answer` learned",
    ),
    Dialect(
        "prompt/completion",
        "`prompt` and `completion`",
        _has("prompt", "completion"),
        _prompt,
        _of(("prompt", "completion"), _TURN),
        becomes="texts, or lists of messages",
    ),
    Dialect(
        "caption",
        "`caption` or `text`, and a picture or video",
        lambda record: bool({"caption", "text"} & record.keys()) and any(record.get(key) for key in _MEDIA),
        _caption,
        _of(("caption", "text")),
        becomes="the medium is shown, the text learned",
    ),
)
"""In the order in which they are tried."""


def tell(record: Record) -> Dialect:
    """The dialect of a record without its nulls.

    Raises:
        Problem: a record of none of them.
    """
    found = next((dialect for dialect in DIALECTS if dialect.tells(record)), None)
    if found is None:
        ways = "; ".join(dialect.told_by.replace("`", '"') for dialect in DIALECTS)
        raise Problem("unknown format", f"a record needs {ways}; it has {', '.join(record) or 'no key'}")
    return found


def add_named_video(record: dict[str, Any], root: str) -> None:
    """Let `video_id` of Video-ChatGPT be a video: the one of that name below `root`, whatever its suffix."""
    name = record.get("video_id")
    if not isinstance(name, str) or not name or any(record.get(key) for key in _MEDIA):
        return
    names = [f"{name}{suffix}" for suffix in ("", *_VIDEO_SUFFIXES)]
    exists = open_root(root).exists
    record["video"] = next((n for n in names if exists(n)), names[1])


def dialect_table() -> str:
    """The dialects as a table of Markdown, for the documentation."""
    rows = [f"| {d.name} | {d.told_by} | {d.becomes} |" for d in DIALECTS]
    return "\n".join(["| dialect | told by | what becomes of it |", "| --- | --- | --- |", *rows])

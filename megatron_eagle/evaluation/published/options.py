"""Options of a choice as tables write them: with letters, in columns, as a list's text, in the question."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

# How a letter stands before an option. A letter in brackets comes last: questions name things so, too.
_MARKS = [
    re.compile(rf"{before}({letter})(?:\s+|$)", re.MULTILINE)
    for before, letter in (
        (r"^[ \t]*", r"[A-Z][.)]|\([A-Z]\)|[A-Z]:"),
        (r"(?:(?<=[\s,;])|^)", r"[A-Z]\."),
        (r"(?:(?<=[\s,;])|^)", r"[A-Z]:"),
        (r"(?:(?<=[\s,;])|^)", r"[A-Z]\)"),
        (r"(?:(?<=[\s,;])|^)", r"\([A-Z]\)"),
    )
]
# What stands before the first option, if it is not on a line of its own: the end of a sentence or a picture.
_STEM = re.compile(r"(?:^|[?.!:;>)\]\"'”’]|\n)[ \t]*$|\b(?:options|choices)\s*$", re.IGNORECASE)
_HEADING = re.compile(r"\s*(options|choices)\s*:?\s*$", re.IGNORECASE)
# What benchmarks say after the last option, on its line or the next one.
_INSTRUCTION = re.compile(
    r"(?:^|\s+)(?:please\s+)?(?:answer|respond|reply|choose|select|output)\b[^\n]*?\b(?:letters?|options?|choices?)\b.*$",
    re.IGNORECASE | re.DOTALL,
)


def inline_options(question: str) -> tuple[str, list[str]]:
    """A question with options in its text -> the question alone, and the options; none if there are none.

    An instruction after the last option belongs to neither.
    """
    for mark in _MARKS:
        run = _run(list(mark.finditer(question)))
        if len(run) < 2 or not _STEM.search(question[: run[0].start()]):
            continue
        ends = [one.start() for one in run[1:]] + [len(question)]
        options = [question[one.end() : end].strip(" ,;\n") for one, end in zip(run, ends, strict=True)]
        options[-1] = _INSTRUCTION.sub("", options[-1].split("\n")[0]).strip(" ,;")
        if all(options):
            return _HEADING.sub("", question[: run[0].start()]).strip(), options
    return question, []


def _run(marks: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last A, and B, C, ... that follow it; nothing if other letters stand between them."""
    letters = [mark[1].strip("().:") for mark in marks]
    if "A" not in letters:
        return []
    start = len(letters) - 1 - letters[::-1].index("A")
    expected = [chr(65 + i) for i in range(len(letters) - start)]
    return marks[start:] if letters[start:] == expected else []


def without_letters(options: Sequence[Any]) -> list[str]:
    """Options without the letters that some tables put before them."""
    texts = [", ".join(map(str, one)) if isinstance(one, list) else str(one) for one in options]
    marked = [re.match(rf"\(?{chr(65 + i)}[.):]\s*(.*)", text, re.DOTALL) for i, text in enumerate(texts)]
    found = [mark[1] for mark in marked if mark is not None]
    return found if len(found) == len(texts) else texts


def letter(index: Any) -> str | None:
    """0 -> A; None where a table has no answer.

    Raises:
        ValueError: no number of an option.
    """
    if index in (None, ""):
        return None
    if not 0 <= int(index) < 26:
        raise ValueError(f"the answer {index!r} counts no option")
    return chr(65 + int(index))


def letter_of(options: Sequence[str], answer: Any) -> str:
    """The letter of the last option that is this text, as authors' scripts find it; empty if none is.

    Raises:
        ValueError: there is no text.
    """
    places = [number for number, option in enumerate(options) if option == str(answer)]
    if not places and answer in (None, ""):
        raise ValueError("there is no answer to compare with")
    return chr(65 + places[-1]) if places else ""


def columns(row: dict[str, Any], names: str = "ABCDEFGHIJ") -> list[str]:
    """Options that are columns A, B, ... of a row; an empty one before others keeps its letter."""
    options = ["" if row.get(name) in (None, "nan") else str(row[name]) for name in names]
    return options[: max((place for place, option in enumerate(options, 1) if option), default=0)]


def listed(value: Any) -> list[Any]:
    """A list, also where a table of text writes it as JSON or as Python does; one value by itself is a list
    of it, and nothing an empty one."""
    if isinstance(value, str) and value.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return list(read(value))
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def first_of(row: dict[str, Any], *names: str) -> Any:
    """The value of the first of these keys that has one.

    Raises:
        KeyError: none has.
    """
    for name in names:
        if row.get(name) is not None and row[name] != "":
            return row[name]
    raise KeyError(" or ".join(names))

"""The configuration reference of docs/configuration.md: every setting of a run's file, from its dataclass.

A setting's words are the comment above it or behind it; those of a section, the docstring of its class.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml

from megatron_eagle.config import to_dict
from megatron_eagle.ranges import Range
from megatron_eagle.training.run_config import RunFile

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


def render(run: type = RunFile) -> str:
    """The reference as Markdown: a heading and a table for each section, sections within sections below."""
    found = list(sections(run))
    index = ", ".join(f"[{place}](#{place.replace('.', '')})" for place, _ in found)
    return "\n\n".join([f"Sections: {index}.", *(_section(cls, place) for place, cls in found)])


def sections(cls: type = RunFile, place: str = "") -> Iterator[tuple[str, type]]:
    """The dataclasses of a configuration by their dotted place, from the outside in; `cls` itself is none."""
    for name, hint in _hints(cls).items():
        if (inner := _dataclass(hint)) is not None:
            where = f"{place}.{name}" if place else name
            yield where, inner
            yield from sections(inner, where)


def unexplained(cls: type) -> list[str]:
    """Settings of a section without a word, beside them or in the section's."""
    words, comments = cls.__doc__ or "", _comments(cls)
    return [name for name in _hints(cls) if not comments.get(name) and f"`{name}" not in words]


def _section(cls: type, place: str) -> str:
    comments = {name: words for name, words in _comments(cls).items() if words}
    text, told = _told(_docstring(cls), set(_hints(cls)) - set(comments))
    comments |= told
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        hint = _hints(cls)[field.name]
        inner = _dataclass(hint)
        kind = f"[section](#{place.replace('.', '')}{field.name})" if inner else _kind(hint)
        cells = (f"`{field.name}`", kind, _default(field), comments.get(field.name, ""))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    source = cls.__module__.replace(".", "/") + ".py"
    head = [f"## `{place}`", text, f"From [{source}](../{source})."]
    return "\n\n".join([*head, "\n".join(["| setting | value | default | |", "|---|---|---|---|", *rows])])


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _dataclass(hint: Any) -> type | None:
    """The dataclass that a value of this type is, None aside."""
    if isinstance(hint, type):
        return hint if dataclasses.is_dataclass(hint) else None
    found = (_dataclass(member) for member in typing.get_args(hint) if member is not type(None))
    return next((cls for cls in found if cls), None)


def _kind(hint: Any) -> str:
    """What a value may be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        legal = next((extra for extra in arguments[1:] if isinstance(extra, Range)), None)
        return f"{_kind(arguments[0])}{_range(legal) if legal else ''}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(member) for member in arguments)
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin is dict:
        return f"mapping of {_kind(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    return _NAMES.get(hint) or getattr(hint, "__name__", str(hint))


def _range(legal: Range) -> str:
    low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (legal.low, legal.high))
    text = low if legal.low == legal.high else f"{low} to {high}"
    return f", {'0 or ' if legal.or_zero else ''}{text}{f': {legal.why}' if legal.why else ''}"


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "**needed**"
    value = field.default_factory()
    return "" if dataclasses.is_dataclass(value) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    text = yaml.safe_dump(to_dict(value), default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _docstring(cls: type) -> str:
    """What the class says of itself, as paragraphs; the parts about arguments and errors are for callers."""
    text = inspect.cleandoc(cls.__doc__ or "")
    text = re.split(r"^(?:Args|Attributes|Raises|Returns):$", text, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _told(text: str, names: set[str]) -> tuple[str, dict[str, str]]:
    """Sentences that begin with one of these settings belong to its row; of one that only another's sentence
    names, the row says whose.

    Returns:
        The text without the rows' sentences, and those.
    """
    rest, told = [], {}
    for paragraph in text.split("\n\n"):
        kept, name = [], ""
        for sentence in re.split(r"(?<=[.)]) (?=[`A-Z])", paragraph):
            begins = re.match(r"`(\w+)`", sentence)
            if begins and begins[1] in names - set(told):
                name = begins[1]
                told[name] = sentence
            elif name and not (begins and begins[1] in names):  # goes on about it
                told[name] += f" {sentence}"
            else:
                kept, name = [*kept, sentence], ""
        rest.append(" ".join(kept))
    text = "\n\n".join(filter(None, rest))
    for name in names - set(told):
        where = next((other for other, words in told.items() if f"`{name}`" in words), None)
        told[name] = f"see `{where}`" if where else "see above" if f"`{name}" in text else ""
    return text, told


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """What the source says of each field: comments above it or behind it, or the text below it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _own_comments(base)
    return found


def _own_comments(cls: type) -> dict[str, str]:
    """Of the fields that stand in the class itself."""
    source = inspect.getsource(importlib.import_module(cls.__module__))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {number for number in comments if source.splitlines()[number - 1].lstrip().startswith("#")}
    tree = ast.parse(source)
    (body,) = (
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    found = {}
    for i, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        words, above = [], node.lineno - 1
        while above in alone:
            words.insert(0, comments[above])
            above -= 1
        words += [
            comments[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments
        ]
        below = body[i + 1] if i + 1 < len(body) else None
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            words.append(inspect.cleandoc(str(below.value.value)))
        found[node.target.id] = " ".join(" ".join(words).split())
    return found

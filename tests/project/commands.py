"""The parsers of the command lines, and the reference of docs/commands.md that is made from them.

Commands of the package build their parsers for who asks. A script's parser is caught when the script is about
to parse: it does not run, and nothing is said here twice.
"""

import argparse
import functools
import importlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from megatron_eagle.commands.table import COMMANDS, PROGRAM
from tests.paths import REPO

BENCH = REPO / "tools" / "bench.py"
"""Stays in the repository."""

_DOOR = re.compile(r"^from megatron_eagle\.commands\.(\w+) import main$", re.MULTILINE)


class Refused(Exception):
    """What argparse says against a command line."""


class _Caught(BaseException):
    """No Exception: a tool must not turn it into a line for its user."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@functools.cache
def parser_of(script: Path) -> argparse.ArgumentParser:
    """The parser that a script builds, or the command that it is the door of.

    Raises:
        ValueError: a script that ends before it parses anything.
    """

    if command := command_of(script):
        return parser_of_command(command, script.name)

    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Caught(parser)

    with (
        patch.object(argparse.ArgumentParser, "parse_args", catch),
        patch.object(argparse.ArgumentParser, "parse_known_args", catch),
        patch.object(sys, "argv", [str(script)]),
        patch.object(sys, "path", [str(script.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Caught as caught:
            return caught.parser
    raise ValueError(f"{script}: does not parse its arguments")


def command_of(script: Path) -> str | None:
    """The command of the package that a script of `tools/` runs."""
    found = _DOOR.search(script.read_text(encoding="utf-8")) if script.parent == BENCH.parent else None
    return found and found[1]


def parser_of_command(name: str, program: str) -> argparse.ArgumentParser:
    """The parser of a command of the package, under the name by which it is called."""
    parser: argparse.ArgumentParser = importlib.import_module(f"megatron_eagle.commands.{name}").build_parser(
        program
    )
    return parser


def scripts() -> dict[str, Path]:
    """The door of each command in `tools/`, in the order in which people use them."""
    found = {command_of(path): path for path in BENCH.parent.glob("*.py")}
    return {name: found[name] for name in COMMANDS}


def check(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Parse a command line in which words in capitals stand for any value.

    Raises:
        Refused: as argparse does; also for words that no argument takes, but for `a.b=c`.
    """
    with _forgiving_capitals():
        _, rest = parser.parse_known_args(list(words))
    unknown = [word for word in rest if not re.fullmatch(r"[\w.]+=.*", word)]
    if unknown:
        raise Refused(f"unrecognized arguments: {' '.join(unknown)}")


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """All option strings of a parser and of the commands below it."""
    below = [flags(inner) for _, inner, _ in _commands(parser)]
    return {text for action in parser._actions for text in action.option_strings}.union(*below)


def render() -> str:
    """The reference as Markdown: a heading for each command, a table of what it takes."""
    doors = scripts()
    index = ", ".join(f"[{name}](#{PROGRAM}-{name})" for name in doors)
    parts = [f"Commands: {index}, and in the repository alone [bench](#python-tools{BENCH.stem}py)."]
    for name, script in doors.items():
        program = f"{PROGRAM} {name}"
        heading, *rest = _parts(parser_of_command(name, program), program, 2)
        parts += [heading, f"In a checkout also `python tools/{script.name}`.", *rest]
    return "\n\n".join([*parts, *_parts(parser_of(BENCH), f"python tools/{BENCH.name}", 2)])


@contextmanager
def _forgiving_capitals() -> Iterator[None]:
    parse: Callable[..., Any] = argparse.ArgumentParser._get_value  # type: ignore[attr-defined]
    compare: Callable[..., Any] = argparse.ArgumentParser._check_value  # type: ignore[attr-defined]

    def is_placeholder(value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r"[A-Z][A-Z0-9_]*", value) is not None

    def get_value(self: argparse.ArgumentParser, action: argparse.Action, text: str) -> Any:
        return text if is_placeholder(text) else parse(self, action, text)

    def check_value(self: argparse.ArgumentParser, action: argparse.Action, value: Any) -> None:
        if not is_placeholder(value):
            compare(self, action, value)

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise Refused(message)

    with (
        patch.object(argparse.ArgumentParser, "_get_value", get_value),
        patch.object(argparse.ArgumentParser, "_check_value", check_value),
        patch.object(argparse.ArgumentParser, "error", error),
    ):
        yield


def _parts(parser: argparse.ArgumentParser, name: str, depth: int) -> Iterator[str]:
    """Heading, description and table of a command, then those of the commands below it."""
    yield f"{'#' * depth} `{name}`"
    yield from _description(parser)
    rows = [_row(action, parser) for action in parser._actions if _is_shown(action)]
    if rows:
        yield "\n".join(["| argument | default | |", "|---|---|---|", *rows])
    for group in parser._mutually_exclusive_groups:
        names = " and ".join(f"`{', '.join(action.option_strings)}`" for action in group._group_actions)
        yield f"Of {names} {'one is needed' if group.required else 'only one'}."
    for command, inner, about in _commands(parser):
        heading, *rest = _parts(inner, f"{name} {command}", depth + 1)
        yield heading
        if about and not inner.description:
            yield f"{about[0].upper()}{about[1:].rstrip('.')}."
        yield from rest


def _description(parser: argparse.ArgumentParser) -> Iterator[str]:
    """In a sentence, and where its lines are laid out by hand what follows as it stands."""
    text = (parser.description or "").strip()
    if "%(prog)s" in text:  # as argparse itself does
        text %= {"prog": parser.prog}
    first, _, rest = text.partition("\n\n")
    if not issubclass(parser.formatter_class, argparse.RawDescriptionHelpFormatter):
        first, rest = text, ""
    if first:
        yield " ".join(first.split()).rstrip(".:") + "."
    if rest:
        yield f"```text\n{rest}\n```"


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """The commands below a parser: name, parser, and what it is for."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                yield name, inner, about.get(name, "")


def _is_shown(action: argparse.Action) -> bool:
    kinds = argparse._HelpAction | argparse._SubParsersAction
    return not isinstance(action, kinds) and action.help != argparse.SUPPRESS


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    values = dict(vars(action), prog=parser.prog)
    about = " ".join(((action.help or "") % values).split())
    needed = action.required and action.nargs != "*"
    default = "**needed**" if needed else _show(action)
    cells = (_name(action), default, about)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _name(action: argparse.Action) -> str:
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.nargs == 0:
        value = ""
    elif action.nargs in ("*", "+"):
        value += " ..."
    return f"`{' '.join(filter(None, (', '.join(action.option_strings), value)))}`"


def _show(action: argparse.Action) -> str:
    default = action.default
    if default is None or default is argparse.SUPPRESS or action.nargs == 0 or default == []:
        return ""
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    return f"`{default}`"

"""The pages that people read, as Markdown: which there are, their code blocks, their generated parts."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.paths import REPO

_FOLDERS = ("docs", "examples", ".github")
_PART = re.compile(r"(<!-- (?P<name>[\w ]+): [^>]*-->\n)(?P<body>.*?)(<!-- end of (?P=name) -->)", re.DOTALL)
_FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block of a page; `line` is that of its first line of code."""

    language: str
    body: str
    line: int


def pages() -> list[Path]:
    """Every page: those at the top, and the ones below docs, examples and .github."""
    below = [page for folder in _FOLDERS for page in sorted((REPO / folder).rglob("*.md"))]
    return [*sorted(REPO.glob("*.md")), *below]


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """The fenced blocks of a page, from the top."""
    for match in _FENCED.finditer(text):
        yield CodeBlock(match["language"], match["body"], text.count("\n", 0, match.start("body")) + 1)


def without_code_blocks(text: str) -> str:
    """A page's prose."""
    return _FENCED.sub("", text)


def fill(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """A page's text with its generated parts made again.

    A part stands between two comments, `<!-- NAME: COMMAND -->` and `<!-- end of NAME -->`.

    Args:
        text: Markdown.
        parts: what stands in each part, by its name.

    Raises:
        KeyError: a part that nobody makes.
    """
    return _PART.sub(lambda match: f"{match[1]}{parts[match['name']]()}\n{match[4]}", text)


def without_parts(text: str) -> str:
    """A page's text without its generated parts; the other lines keep their numbers."""
    return _PART.sub(lambda match: "\n" * match[0].count("\n"), text)

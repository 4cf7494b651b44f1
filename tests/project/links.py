"""What pages point at is there: links, anchors, and paths in backticks. `make lint` runs this file."""

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.paths import REPO
from tests.project.markdown import pages, without_code_blocks

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.*)$", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
# Paths of the project, and files by the endings that it has.
_PATH = re.compile(r"[\w.-]+(?:/[\w.*-]+)+/?|[\w-]+\.(?:py|md|yaml|toml|sh|sbatch|cfg)")

# Files in backticks that are a user's, or that a command writes.
WRITTEN = {
    "recipe.yaml",
    "run.yaml",
    "ref.yaml",
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "logs/metrics.jsonl",
    "logs/events.jsonl",
    "logs/heartbeat",
    "logs/profile",
    "logs/hang.txt",
    "selection/report.html",
    "data/",
    "scores/",
    "runs/demo",
    "runs/demo_moe",
    "shared/",
    "hf/",
    "C/hf",
    "media/",
}


def problems(page: Path, text: str) -> Iterator[str]:
    """What a page points at in vain.

    Args:
        page: where the text stands; relative links begin there.
        text: Markdown.

    Yields:
        A line for each link, anchor or path that leads nowhere.
    """
    prose = without_code_blocks(text)
    for target in _LINK.findall(prose):
        if not re.match(r"[a-z]+:", target):
            yield from _follow(page, text, target)
        elif not target.startswith(("https://", "mailto:")):
            yield f"{target}: no https link"
    for span in _SPAN.findall(prose):
        if _PATH.fullmatch(span) and not _is_known(page, span):
            yield f"`{span}`: no such file"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(without_code_blocks(text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link its text
        anchor = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        number, first = 0, anchor
        while anchor in found:
            number += 1
            anchor = f"{first}-{number}"
        found.add(anchor)
    return found


def _follow(page: Path, text: str, target: str) -> Iterator[str]:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.is_relative_to(REPO) or not there.exists():
        yield f"{target}: no such file"
    elif anchor and anchor not in anchors(text if there == page else there.read_text(encoding="utf-8")):
        yield f"{target}: no such heading"


def _is_known(page: Path, span: str) -> bool:
    """Whether a path is one of the tree: from its top, the page's folder, a package, or by its name alone."""
    if span in WRITTEN or span.rstrip("/") in WRITTEN:
        return True
    starts = (REPO, page.parent, REPO / "megatron_eagle", REPO / "kernels")
    if any(any(start.glob(span.rstrip("/"))) for start in starts):
        return True
    return "/" not in span and span in _names()


@cache
def _names() -> set[str]:
    """The names of all files of the tree."""
    folders = ("docs", "examples", "kernels", "megatron_eagle", "tests", "tools", ".github")
    return {path.name for folder in folders for path in (REPO / folder).rglob("*") if path.is_file()}


def main() -> int:
    """Print what is wrong with all pages; 1 if anything is."""
    found = [
        f"{page.relative_to(REPO)}: {problem}"
        for page in pages()
        for problem in problems(page, page.read_text(encoding="utf-8"))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

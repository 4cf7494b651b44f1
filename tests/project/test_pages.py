"""Generated parts are up to date, pages can be found, and the README stays short."""

import re
import subprocess
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from megatron_eagle.ranges import Range
from tests.paths import REPO
from tests.project import configuration, links
from tests.project.markdown import fill, pages, without_parts
from tests.project.pages import PARTS

README_LINES = 200


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPO)))
def test_generated_parts_are_up_to_date(page):
    if not (REPO / ".git").exists():
        pytest.skip("no git checkout, which the file map lists")
    text = page.read_text(encoding="utf-8")
    assert fill(text, PARTS) == text, "run `make docs`"


def test_every_part_stands_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    for name in PARTS:
        assert f"<!-- {name}: " in text and f"<!-- end of {name} -->" in text


def test_a_part_that_differs_is_noticed():
    text = "before\n<!-- floors: make docs -->\nold\n<!-- end of floors -->\nafter\n"
    assert fill(text, {"floors": lambda: "new"}) == text.replace("old", "new")
    assert fill(text, {"floors": lambda: "old"}) == text
    assert without_parts(text) == "before\n\n\n\nafter\n"
    with pytest.raises(KeyError):
        fill(text, {})


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= README_LINES
    for page in sorted((REPO / "docs").glob("*.md")):
        assert f"(docs/{page.name})" in readme


def test_each_page_of_the_documentation_begins_with_its_question():
    for page in sorted((REPO / "docs").glob("*.md")):
        assert re.match(r"# [\w -]+: .*\?\n", page.read_text(encoding="utf-8")), page.name


def test_every_room_stands_in_the_architecture():
    rooms = [path.parent for path in (REPO / "megatron_eagle").rglob("__init__.py")]
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    inner = ("prompts", "published", "data", "megatron_eagle")  # parts of a room, and what holds rooms
    for room in rooms:
        assert room.name in inner or f"(../{room.relative_to(REPO)})" in page, room


# What people look for, in the words in which they look for it.
FEATURES = """
    recipe tile ADS tokenizer Ray transcoding pack prefetch PDF DALI lint preview LoRA preset FLOPs MFU frozen
    zigzag balanced Ulysses attention sharding Triton offload patch optimizer stages held-out TensorBoard W&B
    heartbeat profiler stragglers NaN spikes media resharding Hugging planner memory demo benchmark judge
    score chapter override ledger Slurm Kubernetes SkyPilot vLLM card
"""


@pytest.mark.parametrize("word", FEATURES.split())
def test_a_feature_is_found_by_its_word(word):
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8").partition("\n## Floors")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    found = [row for row in rows if word.lower() in row.lower()]
    assert 1 <= len(found) <= 3, found


def test_what_points_at_a_page_points_at_one():
    """Sources and examples name pages in comments and messages."""
    command = ["git", "grep", "-ohE", r"\bdocs/[a-z-]+\.md"]
    if not (REPO / ".git").exists():
        pytest.skip("no git checkout")
    found = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    assert found
    for name in set(found):
        assert (REPO / name).is_file(), name


@dataclass
class _Inner:
    """Of an inner section."""

    size: Annotated[int, Range(1, 4096, or_zero=True, why="because")] = 3  # behind it


@dataclass
class _Outer:
    """Of a section.

    Raises:
        UserError: not for the page.
    """

    # Above it,
    # in two lines.
    path: str
    kind: Literal["a", "b"] | None = None
    """Below it."""
    inner: _Inner = field(default_factory=_Inner)
    rates: dict[str, Annotated[float, Range(0, 1)]] = field(default_factory=dict)
    hidden: int = field(default=0, init=False)


@dataclass
class _Run:
    outer: _Outer


def test_a_setting_has_type_range_default_and_words():
    text = configuration.render(_Run)
    assert "## `outer`\n\nOf a section.\n\nFrom [" in text and "not for the page" not in text
    assert "| `path` | text | **needed** | Above it, in two lines. |" in text
    assert "| `kind` | `a`, `b` or null | `null` | Below it. |" in text
    assert "| `inner` | [section](#outerinner) |  |  |" in text
    assert "| `rates` | mapping of number, 0 to 1 | `{}` |  |" in text
    assert "| `size` | whole number, 0 or 1 to 4,096: because | `3` | behind it |" in text
    assert "hidden" not in text
    assert {"outer", "outerinner"} <= links.anchors(text)


def test_every_setting_is_explained():
    """In words beside it, or in those of its section."""
    for place, cls in configuration.sections():
        assert not configuration.unexplained(cls), place


def test_a_setting_without_words_is_noticed():
    assert configuration.unexplained(_Outer) == ["inner", "rates"]
    assert not configuration.unexplained(_Inner)

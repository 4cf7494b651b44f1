"""The README's times and sizes are no more than a factor of 2 off what is measured here."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.project import first_run

CARD = first_run.read_card()
ALIKE = first_run.processor() == CARD["processor"]


def test_the_environment_is_as_large_as_the_readme_says():
    if torch.__version__ != CARD["torch"]:
        pytest.skip(f"torch {torch.__version__} is here, the README speaks of {CARD['torch']}")
    assert not first_run.off(CARD, "environment", {"bytes": first_run.size(Path(sys.prefix))}, alike=ALIKE)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_commands_take_the_time_that_the_readme_says(target):
    """As they took it when they ran here last."""
    file = first_run.RECORDS / f"{target}.json"
    if not file.is_file():
        pytest.skip(f"`make {target}` has not passed here yet")
    assert not first_run.off(CARD, target, json.loads(file.read_text()), alike=ALIKE)


def test_the_demo_leaves_as_much_as_the_readme_says():
    if not (first_run.DEMO / "last_screen.txt").is_file():
        pytest.skip("`make demo` has not passed here yet")
    assert not first_run.off(CARD, "demo", {"bytes": first_run.size(first_run.DEMO)}, alike=ALIKE)


@pytest.mark.parametrize(
    ("measured", "alike", "lines"),
    [
        ({"seconds": 100, "cpu_seconds": 190, "bytes": 1000}, True, 0),
        ({"seconds": 190, "cpu_seconds": 300, "bytes": 1999}, True, 0),
        ({"seconds": 900, "cpu_seconds": 190}, True, 0),  # others worked here too
        ({"seconds": 100, "cpu_seconds": 401}, True, 1),
        ({"seconds": 100, "cpu_seconds": 401}, False, 1),
        ({"seconds": 49, "cpu_seconds": 99}, True, 2),
        ({"seconds": 49, "cpu_seconds": 99}, False, 0),  # a faster processor
        ({"bytes": 2001}, False, 1),
        ({"bytes": 499}, False, 1),
    ],
)
def test_a_figure_that_is_off_is_noticed(measured, alike, lines):
    card = {"rows": [{"what": "demo", "seconds": 100, "cpu_seconds": 200, "bytes": 1000}]}
    assert len(first_run.off(card, "demo", measured, alike=alike)) == lines


def test_seconds_beside_other_work_promise_nothing():
    card = {"rows": [{"what": "test", "seconds": 1000, "cpu_seconds": 400, "load": 1000}]}
    assert not first_run.off(card, "test", {"seconds": 300, "cpu_seconds": 390}, alike=True)
    assert first_run.off(card, "test", {"seconds": 300, "cpu_seconds": 190}, alike=True)


def test_sizes_are_those_of_all_files_below_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "file")
    assert 100_000 <= first_run.size(tmp_path) < 120_000

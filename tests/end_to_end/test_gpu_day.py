"""A borrowed hour: what runs in which order, what is left out, what a second start passes over."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paths import REPO
from tests.project.commands import BENCH, parser_of

SCRIPT = REPO / "tools" / "gpu_day.sh"
MARK = re.compile(r"pytest\.mark\.gpu")


def gpu_day(folder: Path, *words: str, items: str | None = None) -> tuple[int, list[str]]:
    """Exit status, and what was printed, by lines."""
    environment = {**os.environ, "GPU_DAY": str(folder / "results"), "PYTHON": sys.executable}
    if items is not None:
        (folder / "items").write_text(items)
        environment["GPU_DAY_ITEMS"] = str(folder / "items")
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


# The second fails until it is mended; the third is Python's.
ITEMS = """
# minutes, name, command
2 first echo ran >> {0}/order
5 long echo never >> {0}/order
1 second echo broken; test -e {0}/mended
1 third $python -c 'print("third", file=open("{0}/order", "a"))'
"""


def test_order_time_and_going_on(tmp_path):
    items = ITEMS.format(tmp_path)
    status, said = gpu_day(tmp_path, "4", "--list", items=items)
    assert status == 0 and not (tmp_path / "order").exists()
    assert [line.split()[0] for line in said] == ["first", "long", "second", "third"]
    assert "would run, at most 2 minutes" in said[0]
    assert "left out: it may take 5 minutes, and 2 are left" in said[1]
    assert f"would run, at most 1 minutes: {sys.executable} -c" in said[3]

    status, said = gpu_day(tmp_path, "4", items=items)
    assert status == 1 and (tmp_path / "order").read_text().split() == ["ran", "third"]
    told = [" ".join(line.split()) for line in said]
    assert told[0].startswith("first passed after")
    assert told[1] == "long left out: it may take 5 minutes, and 4 are left"
    assert told[2].startswith("second failed after") and told[2].endswith(": broken")
    assert told[4].startswith("2 passed; see ")

    (tmp_path / "mended").touch()
    status, said = gpu_day(tmp_path, "4", items=items)
    told = [" ".join(line.split()) for line in said]
    assert status == 0 and told[0] == "first passed before, at this commit"
    assert told[2].startswith("second passed") and told[3] == "third passed before, at this commit"
    assert (tmp_path / "order").read_text().split() == ["ran", "third"]


def test_an_item_ends_with_its_time(tmp_path):
    """The minute that it may take is a second here: nothing but the clock is another."""
    script = SCRIPT.read_text().replace("$((most * 60)) bash -c", "$((most)) bash -c")
    copy = tmp_path / "tools" / "gpu_day.sh"
    copy.parent.mkdir()
    copy.write_text(script)
    (tmp_path / "items").write_text("1 endless sleep 50\n1 next true\n")
    environment = {**os.environ, "GPU_DAY": str(tmp_path), "GPU_DAY_ITEMS": str(tmp_path / "items")}
    done = subprocess.run(
        ["bash", str(copy), "2"], env=environment, capture_output=True, text=True, timeout=40
    )
    first, second, *_ = done.stdout.splitlines()
    assert "failed after 1 seconds, when its time was over" in first and "passed" in second
    assert done.returncode == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_machine_without_a_gpu_passes_nothing(tmp_path):
    """Tests for a GPU are skipped there, which is no success."""
    status, said = gpu_day(tmp_path, "9")
    assert status == 2 and len(said) == 1 and "finds no CUDA device here" in said[0]


@pytest.mark.parametrize("words", [[], ["0"], ["-5"], ["ten"], ["10", "--lst"]])
def test_bad_words_are_one_line(words, tmp_path):
    status, said = gpu_day(tmp_path, *words)
    assert (status, len(said)) == (2, 1) and said[0].startswith("usage: tools/gpu_day.sh MINUTES")
    assert not (tmp_path / "results").exists()


def test_the_hour_holds_everything_that_only_a_gpu_can_show(tmp_path):
    """Every file with a test for a GPU, every benchmark that needs one; the rehearsal is compared first."""
    status, said = gpu_day(tmp_path, "9999", "--list")
    assert status == 0 and all("would run" in line for line in said)
    commands = [line.partition("minutes: ")[2].split()[1:] for line in said]
    assert [line.split()[0] for line in said[:2]] == ["base", "rehearsal"]
    named = [REPO / word for command in commands if "pytest" in command for word in command[5:]]
    assert all(path.exists() for path in named)
    marked = [file for file in (REPO / "tests").rglob("test_*.py") if MARK.search(file.read_text())]
    missing = [file for file in marked if not any(path in (file, *file.parents) for path in named)]
    assert len(marked) > 10 and missing == []
    benches = [command[1:] for command in commands if command[0] == "tools/bench.py"]
    for words in benches:
        parsed = parser_of(BENCH).parse_args(words)
        assert parsed.json.startswith("examples/cards/")
    assert {"rehearsal", "attention", "train_gpu", "kernels", "linear_ce"} == {words[0] for words in benches}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    result = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout

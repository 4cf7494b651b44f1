"""examples/slurm/preprocess.sbatch on a real Slurm with a real Ray, of EAGLE_RAY_PYTHON's environment."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import LENGTH
from tests.data.helpers import conversation, make_tokenizer
from tests.paths import REPO

pytestmark = pytest.mark.slow
SCRIPT = REPO / "examples" / "slurm" / "preprocess.sbatch"
OPTIONS = ("--nodes=2", "--cpus-per-task=1")


@pytest.fixture
def job(slurm, tmp_path):
    """`job(lines, **environment)` submits preprocessing of so many lines into `tmp_path`/store."""
    python = os.environ.get("EAGLE_RAY_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import ray"], capture_output=True).returncode:
        pytest.skip(f"{python} has no Ray: set EAGLE_RAY_PYTHON")
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "recipe.json").write_text(json.dumps({"chat": {"annotation": str(tmp_path / "data.jsonl")}}))
    names = {"recipe": "recipe.json", "tokenizer": "tokenizer", "output": "store"}
    arguments = [word for name, file in names.items() for word in (f"--{name}", str(tmp_path / file))]
    arguments += ["--max-tokens", str(LENGTH), "--tile-size", "28", "--patch-size", "14"]
    # Another Ray comes first in PATH.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "ray").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def submit(lines: int = 40, **environment: str) -> int:
        texts = (conversation(f"Hi {k}", "Yes " * (k % 5 + 1)) for k in range(lines))
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        environment = {"PYTHON": python, "PATH": path, **environment}
        return slurm.submit(SCRIPT, *arguments, options=OPTIONS, environment=environment)

    return submit


def processes(node: str, program: str) -> list[int]:
    """Of a node, by the name of their program."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    space = next(word for line in found.splitlines() if (word := line.split()[0]).endswith(node))
    pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in pids.split() if name_of(pid) == program]


def name_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text().partition("\0")[0].rpartition("/")[2]
    except OSError:  # it has ended
        return ""


def test_two_nodes(slurm, job, tmp_path):
    number = job()
    slurm.wait(number, "COMPLETED", seconds=300)
    assert (tmp_path / "store" / "manifest.json").exists()


def test_a_node_that_does_not_come_is_named(slurm, job):
    """The head is there; the other host's Ray is stopped before it has reported."""
    number = job(RAY_START_SECONDS="1")
    slurm.wait(number, "FAILED", seconds=120)
    assert re.search(r"^error: .* after 1 s; missing: (n1, )?n2$", slurm.output(number), re.M)
    assert "Traceback" not in slurm.output(number)


@pytest.mark.parametrize(("node", "name"), [("n1", "gcs_server"), ("n2", "raylet")], ids=["head", "worker"])
def test_a_node_that_dies_ends_the_job(slurm, job, node, name):
    """In seconds, where the nodes would have been held for minutes."""
    number = job(300_000)
    slurm.wait_for_line(number, "preprocess: ")
    os.kill(processes(node, name)[0], 9)
    began = time.monotonic()
    slurm.wait(number, "FAILED", seconds=120)
    assert time.monotonic() - began < 60
    assert f"preprocess.sbatch: Ray on {node} has ended" in slurm.output(number)

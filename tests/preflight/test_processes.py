"""`train.py preflight` in real processes, each of which is told that it is a node of its own."""

import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.preflight.lead import BAD_NODE, FINE, MISTAKE
from megatron_eagle.preflight.meeting import UNMET
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.paths import REPO

LENGTH = 256


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest model; its folder is not there yet."""
    folder = tmp_path_factory.mktemp("data")
    records = [conversation("Hi", "Yes")] * 4
    store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (LENGTH,))
    write_packs(store, LENGTH, seed=0)
    sections = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(store), "length": LENGTH},
        "training": {"train_iterations": 2, "global_batch_size": 12, "precision": "fp32"},
        "checkpoint": {"path": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder / "run.yaml"


@dataclass
class Job:
    """What came of it: the statuses, the output of the first process that has started, the seconds."""

    statuses: list[int]
    output: str
    errors: str
    seconds: float


def preflight(config: Path, *arguments: str, nodes: int = 3, faults: dict[int, str] | None = None) -> Job:
    """One process a node; those in `faults` suffer theirs, or do not start (`absent`)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    faults, running, began = faults or {}, {}, time.monotonic()
    for rank in range(nodes):
        suffered = faults.get(rank, "")
        if suffered == "absent":
            continue
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(nodes),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SLURMD_NODENAME": f"n{rank + 1}",
            "SLURM_STEP_NODELIST": f"n[1-{nodes}]",
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})",
            "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.preflight.ailing", *suffered.split(), "--"]
        command += ["--config", str(config), *arguments]
        pipes = {} if running else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running[rank] = subprocess.Popen(command, cwd=REPO, env=environment, text=True, **pipes)
    try:
        output, errors = running[min(running)].communicate(timeout=240)
        statuses = [process.wait(timeout=60) for process in running.values()]
    finally:
        for process in running.values():
            process.kill()
    return Job(statuses, output, errors, time.monotonic() - began)


def findings(job: Job) -> list[str]:
    """The lines of the report that name something."""
    return re.findall(r"^(?:bad node|slow node|mistake|note): .*", job.output, re.MULTILINE)


def left_behind(config: Path) -> list[Path]:
    return list(config.parent.rglob(".preflight*"))


def test_a_node_with_another_clock_and_another_package(config, tmp_path):
    job = preflight(config, "--bad-nodes", str(tmp_path / "bad"), faults={1: "clock=60 package=0.1"})
    assert job.statuses == [BAD_NODE] * 3, job.errors
    package, clock = findings(job)
    assert re.fullmatch(r"bad node: n2: its clock is (59|60)\.\d s ahead of the others': is NTP on\?", clock)
    assert package.startswith("bad node: n2: other than most nodes") and ": numpy 0.1 (" in package
    assert (tmp_path / "bad").read_text() == "n2\n"
    rows = job.output.splitlines()[2:5]
    assert [row.split()[0] for row in rows] == ["n1", "n2", "n3"]
    assert all(re.search(r" [MG]B/s( |$)", row) for row in rows), "all have met others"
    assert [row.endswith("bad node") for row in rows] == [False, True, False]
    assert not left_behind(config) and not (config.parent / "run").exists()


@pytest.mark.slow
def test_nothing_is_wrong(config, tmp_path):
    job = preflight(config, "--bad-nodes", str(tmp_path / "bad"), "--writes", str(tmp_path))
    assert job.statuses == [FINE] * 3 and findings(job) == [] and not job.errors
    assert not (tmp_path / "bad").exists() and not left_behind(config) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("elsewhere={}", "bad node: n{}: {folder} is another folder there: it sees what n{} has written"),
        ("read-only", "bad node: n{}: {folder} cannot be written: Read-only file system"),
    ],
)
@pytest.mark.parametrize("rank", [0, 2])  # who judges, and another
def test_folders(config, tmp_path, fault, said, rank):
    job = preflight(config, faults={rank: fault.format(tmp_path)})
    assert job.statuses == [BAD_NODE] * 3
    (line,) = findings(job)
    assert line.startswith(said.format(rank + 1, rank + 1, folder=config.parent)), line
    assert not left_behind(config) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("absent", r"n2: 1 of its processes \(1\) have not come within 16 s"),
        (
            "stop=look",
            "n2: rank 1 came, and then said nothing more within 15 s, at: a look at files, packages",
        ),
        ("stop=messages", "n2: rank 1 came, and then said nothing more within 15 s, at: all-to-all"),
    ],
)
def test_a_node_that_is_not_there_or_stands_still(config, tmp_path, fault, said):
    """It is named within the time that a part may take, and the others end."""
    arguments = ("--seconds", "15", "--meet-seconds", "16", "--bad-nodes", str(tmp_path / "bad"))
    job = preflight(config, *arguments, faults={1: fault})
    assert job.statuses == [BAD_NODE] * (2 if fault == "absent" else 3), job.errors
    (line,) = findings(job)
    assert re.match(f"bad node: {said}", line), line
    assert (tmp_path / "bad").read_text() == "n2\n" and job.seconds < 90


@pytest.mark.slow
def test_rank_0_is_not_there(config):
    """Who hears no verdict says so with a status of its own: it is no mistake, and another start may help."""
    job = preflight(config, "--meet-seconds", "3", nodes=2, faults={0: "absent"})
    assert job.statuses == [UNMET]
    (said,) = re.findall(r"^error: .*", job.errors, re.MULTILINE)
    assert said.startswith("error: rank 1 of 2 on ") and "within 0.05 minutes" in said


@pytest.mark.slow
def test_rank_0_stands_still(config, tmp_path):
    """It looks at its node in a thread, and judges all the same."""
    job = preflight(config, "--seconds", "15", faults={0: "stop=look"})
    assert job.statuses == [BAD_NODE] * 3 and [line[:13] for line in findings(job)] == ["bad node: n1:"]


@pytest.mark.slow
def test_mistakes_are_said_once(config, tmp_path):
    """Of the settings, of data that no node has, and of what one process can know by itself."""
    absent = tmp_path / "absent.yaml"
    job = preflight(absent, nodes=2)
    assert job.statuses == [MISTAKE] * 2 and "absent.yaml: cannot read this configuration file" in job.errors
    job = preflight(config, "training.global_batch_size=5", nodes=2)
    assert job.statuses == [MISTAKE] * 2 and job.errors.startswith("error: ") and job.errors.count("\n") == 1
    full = preflight(config, "model.text.hidden_size=8192", "model.text.vocab_size=99999999", nodes=2)
    assert full.statuses == [MISTAKE] * 2


@pytest.mark.slow
def test_one_machine(config):
    """Without a launcher, and with torchrun."""
    command = ["tools/train.py", "preflight", "--config", str(config)]
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'kernels'}", "PYTHONWARNINGS": "ignore"}
    for before, processes in (
        ([], "1 process"),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "2 processes"),
    ):
        done = subprocess.run(
            [sys.executable, *before, *command], cwd=REPO, env=environment, capture_output=True, text=True
        )
        assert done.returncode == FINE, done.stderr
        assert f"preflight: 1 node, {processes}, " in done.stdout
        assert done.stdout.endswith("preflight: nothing stands in the way\n")

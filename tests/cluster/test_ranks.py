"""Processes of a job: as tasks of srun, or torchrun's, each with a log of its own; stopped by the signal that
comes before the end of the time, and gone on with."""

import json
import re
from pathlib import Path

import pytest

from megatron_eagle.checkpoint import read_train_state
from tests.cluster.conftest import OPTIONS, TRAIN
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.slow


def iterations(run: Path) -> list[int]:
    file = run / "logs" / "metrics.jsonl"
    return [json.loads(line)["iteration"] for line in file.read_text().splitlines()] if file.exists() else []


def stop_and_go_on(slurm: Slurm, job: int, run: Path) -> None:
    """The signal reaches the batch script alone; the run saves, and the same job ends it after a requeue."""
    slurm.wait_until(lambda: len(iterations(run)) >= 2, job)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait_for_requeue(job)
    stopped = read_train_state(run).iteration
    assert 2 <= stopped < 60
    slurm.wait(job, "COMPLETED", restarts=1)
    assert f"resumed from {run} at iteration {stopped}" in slurm.output(job)
    assert iterations(run) == list(range(1, 61))
    assert "Traceback" not in slurm.output(job), "a planned stop is no error"


def test_tasks_of_srun(slurm, config, tmp_path):
    """Four processes on two nodes are one run."""
    run, logs = tmp_path / "run", tmp_path / "ranks"
    environment = {"LAUNCH": "srun", "PROCESSES": "2", "RANK_LOGS": str(logs)}
    settings = (
        "training.stop_at_iteration=60",
        "training.global_batch_size=4",
        "resilience.heartbeat_seconds=1",
    )
    job = slurm.submit(TRAIN, str(config), *settings, options=OPTIONS, environment=environment)
    stop_and_go_on(slurm, job, run)
    assert sorted(file.name for file in logs.glob("rank_*")) == [f"rank_{rank:05d}.log" for rank in range(4)]
    assert "resumed from" in (logs / "rank_00000.log").read_text()
    assert "resumed from" not in (logs / "rank_00003.log").read_text()
    assert re.search(r"^0: .*resumed from", slurm.output(job), re.M)
    beats = [json.loads(file.read_text()) for file in sorted((run / "logs" / "heartbeat").glob("*.json"))]
    assert [(beat["rank"], beat["host"]) for beat in beats] == [(0, "n1"), (1, "n1"), (2, "n2"), (3, "n2")]


def test_processes_of_torchrun(slurm, config, tmp_path):
    """Lines say of which rank they are; each rank's are in a folder of its node."""
    logs = tmp_path / "ranks"
    job = slurm.submit(
        TRAIN,
        str(config),
        "training.stop_at_iteration=60",
        options=OPTIONS,
        environment={"RANK_LOGS": str(logs)},
    )
    stop_and_go_on(slurm, job, tmp_path / "run")
    assert re.search(r"^\[rank 0\] resumed from", slurm.output(job), re.M)
    found = {file.relative_to(logs).parts[0] for file in logs.glob("*/*/attempt_0/0/stderr.log")}
    assert found == {"n1", "n2"}


SCRIPT = """#!/usr/bin/env bash
cd "$REPO"
"$PYTHON" tools/train.py run --config "$1" checkpoint.path="$2"/alone training.stop_at_iteration=1
srun "$PYTHON" tools/train.py run --config "$1" checkpoint.path="$2"/two training.stop_at_iteration=1
RANK=0 srun "$PYTHON" tools/train.py run --config "$1"
"""


def test_srun_alone(slurm, config, tmp_path):
    """One run of two processes, where one in the batch script is one; one line where it is not clear."""
    script = tmp_path / "job.sh"
    script.write_text(SCRIPT)
    job = slurm.submit(script, str(config), str(tmp_path), options=OPTIONS)
    slurm.wait(job, "FAILED")
    for name, ranks in (("alone", 1), ("two", 2)):
        assert len(list((tmp_path / name / "logs" / "heartbeat").glob("*.json"))) == ranks
        assert iterations(tmp_path / name) == [1]
    output = slurm.output(job)
    assert output.count("error: srun has started 2 processes, and RANK is set but not WORLD_SIZE") == 1
    assert "Traceback" not in output


def test_a_folder_that_is_not_there(slurm, config, tmp_path):
    (tmp_path / "file").touch()
    for environment, line in (
        ({"REPO": str(tmp_path)}, f"{tmp_path} on n1 is not this repository: call sbatch there, or set REPO"),
        (
            {"RANK_LOGS": str(tmp_path / "file" / "ranks")},
            "cannot make the folder .*/file/ranks .* set RANK_LOGS",
        ),
        ({"LAUNCH": "mpirun"}, "LAUNCH=mpirun: expected torchrun or srun"),
    ):
        job = slurm.submit(TRAIN, str(config), options=OPTIONS, environment=environment)
        slurm.wait(job, "FAILED")
        assert re.fullmatch(f"train.sbatch: {line}\n", slurm.output(job))


def test_a_host_that_is_cut_off_is_named(slurm, config, tmp_path):
    """Three nodes, of which one loses its link while it trains; the file system is still there for all."""
    run = tmp_path / "run"
    settings = (
        "training.global_batch_size=3",
        "resilience.heartbeat_seconds=1",
        "resilience.hang_minutes=0.1",
    )
    options = ("--gpus-per-node=0", "--nodes=3", "--no-kill")
    job = slurm.submit(TRAIN, str(config), *settings, options=options, environment={"RDZV_SECONDS": "20"})
    slurm.wait_until(lambda: len(iterations(run)) >= 2, job)
    with slurm.cut("n3"):
        slurm.wait_until(lambda: (run / "logs" / "hang.txt").exists(), job)
        report = (run / "logs" / "hang.txt").read_text()
    assert re.match(r"host n3 is cut off from the others: rank 2 on n3 ", report), report

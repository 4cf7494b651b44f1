"""examples/slurm/train.sbatch on a real Slurm: stopped in every way, requeued by itself, gone on with.

The signal before the end of the time is in test_ranks.py.
"""

import shutil
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_eagle.checkpoint import read_train_state
from megatron_eagle.training.monitoring.metrics import read_metrics
from tests.cluster.conftest import ONE_NODE, OPTIONS, TRAIN
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.slow
ENOUGH = 60  # iterations, while which a test can do what it wants to


def iterations(run: Path) -> list[int]:
    """Those that its log has, in its order."""
    file = run / "logs" / "metrics.jsonl"
    return [line.iteration for line in read_metrics(file)] if file.exists() else []


def preempt(slurm: Slurm) -> int:
    """A job of the urgent partition on all nodes; its number."""
    wanted = ("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1")
    return int(slurm.call("sbatch", "--parsable", f"--output={slurm.folder}/urgent.out", *wanted).stdout)


def test_a_chain_is_preempted_with_a_grace_time(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    """SIGTERM goes to the steps: the stage saves and is requeued, and the next one goes on waiting for it."""
    sections = yaml.safe_load(config.read_text())
    stage = {"training": {"train_iterations": ENOUGH}}
    sections["stages"] = {"first": stage, "second": {"training": {"train_iterations": 2}}}
    config.write_text(yaml.safe_dump(sections))
    chain = slurm.call(
        str(TRAIN.with_name("progressive.sh")), str(config), *OPTIONS, f"--output={slurm.folder}/job-%j.out"
    )
    first, second = (int(line.rpartition(" ")[2]) for line in chain.stdout.splitlines())
    run = tmp_path / "run" / "first"
    slurm.wait_until(lambda: len(iterations(run)) >= 2, first)
    urgent = preempt(slurm)
    slurm.wait(first, "PENDING", restarts=1)
    slurm.wait_for_line(first, "goes back to the queue")
    stopped = read_train_state(run).iteration
    slurm.wait(urgent, "COMPLETED")
    assert slurm.job(second)["JobState"] == "PENDING"
    slurm.wait_for_requeue(first)
    slurm.wait(first, "COMPLETED", restarts=1)
    assert f"at iteration {stopped}" in slurm.output(first)
    assert iterations(run) == list(range(1, ENOUGH + 1))
    slurm.wait(second, "COMPLETED")


def checks(config: Path) -> bool:
    """Whether `train.py check` looks at the settings now."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return any(line[1:3] == ["tools/train.py", "check"] and str(config) in line for line in lines)


def test_a_preemption_during_the_checks(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    """It does not kill the job, which is requeued without having trained, and trains then."""
    job = slurm.submit(TRAIN, str(config), "training.stop_at_iteration=2", options=ONE_NODE)
    slurm.wait_until(lambda: checks(config), job)
    preempt(slurm)
    slurm.wait_for_requeue(job)
    assert not (tmp_path / "run" / "logs").exists()
    slurm.wait(job, "COMPLETED", restarts=1)
    assert iterations(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_sigterm_to_the_script_alone(slurm: Slurm, config: Path, tmp_path: Path, launch: str) -> None:
    """It stops the run, which goes back to the queue; a job that the user cancels stays cancelled, though it
    stops in the same way. What the environment says of a job in which sbatch was called is not believed."""
    run = tmp_path / "run"
    environment = {"SLURM_NTASKS": "3", "SLURM_NPROCS": "3", "SLURM_RESTART_COUNT": "2", "LAUNCH": launch}
    job = slurm.submit(TRAIN, str(config), options=ONE_NODE, environment=environment)
    slurm.wait_until(lambda: len(iterations(run)) >= 2, job)
    slurm.call("scancel", "--batch", "--signal=TERM", str(job))
    slurm.wait_for_requeue(job)
    stopped = read_train_state(run).iteration
    slurm.wait_until(lambda: len(iterations(run)) >= stopped + 2, job)
    slurm.call("scancel", str(job))
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "1"
    assert f"at iteration {stopped}" in slurm.output(job)
    assert iterations(run) == list(range(1, len(iterations(run)) + 1))


def test_no_requeue_for_ever(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    """Told to stop before it has saved anything, during the checks: that does not kill the job, which is
    requeued, but not twice, where once is allowed."""
    limit = {"MAX_REQUEUES_WITHOUT_PROGRESS": "1"}
    job = slurm.submit(TRAIN, str(config), options=ONE_NODE, environment=limit)
    slurm.wait_until(lambda: checks(config), job)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait_for_requeue(job)
    assert not (tmp_path / "run" / "logs").exists()
    slurm.wait_until(lambda: checks(config), job)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait(job, "FAILED", restarts=1)
    assert "was requeued 1 times in a row without a new checkpoint: not again" in slurm.output(job)


@pytest.mark.parametrize("check_space", ["true", "false"])
def test_a_full_disk(slurm: Slurm, config: Path, tmp_path: Path, check_space: str) -> None:
    """Refused before the first step; where that is not looked at, the failed last save is said once, and
    neither torchrun nor Slurm trains the same again."""
    disk = slurm.disk / tmp_path.name
    disk.mkdir()
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
    try:
        settings = [f"checkpoint.path={disk / 'run'}", f"checkpoint.check_space={check_space}"]
        logs = {"RANK_LOGS": str(tmp_path / "ranks")}
        job = slurm.submit(
            TRAIN, str(config), *settings, "training.stop_at_iteration=3", options=ONE_NODE, environment=logs
        )
        assert slurm.wait(job, "FAILED")["Restarts"] == "0"
    finally:
        shutil.rmtree(disk)
    outcome = (tmp_path / "ranks" / f"outcome-{job}").read_text().split("\n")
    said = slurm.output(job)
    assert outcome == [f"started 0 {disk / 'run'}", "failed", ""]
    if check_space == "true":
        assert said.count("GB are free, too few for the run's checkpoints") == 1
    else:
        assert "No space left on device" in said

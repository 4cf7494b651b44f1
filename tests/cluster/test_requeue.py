"""A node that fails again and again, and one that dies: the job goes on from its checkpoint on others."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.resilience.faults import VARIABLE
from tests.cluster.conftest import OPTIONS, TRAIN
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.slow
ITERATIONS, SAVES_EVERY = 14, 4


@pytest.fixture
def saving(config: Path) -> Path:
    """The file of a run that saves every few iterations."""
    sections = yaml.safe_load(config.read_text())
    sections["training"]["train_iterations"] = ITERATIONS
    sections["checkpoint"] |= {"save_interval": SAVES_EVERY, "keep_last": 2}
    config.write_text(yaml.safe_dump(sections))
    return config


def losses(run: Path) -> list[tuple[int, float]]:
    """By iteration; a repeated one counts once, as in the log."""
    file = run / "logs" / "metrics.jsonl"
    return [(line.iteration, line.loss) for line in read_metrics(file)] if file.exists() else []


def history(logs: Path, job: int) -> list[dict]:
    return [json.loads(line) for line in (logs / f"history-{job}.jsonl").read_text().splitlines()]


def uninterrupted(slurm: Slurm, config: Path, folder: Path) -> list[tuple[int, float]]:
    """The losses of a run that nothing happens to."""
    job = slurm.submit(TRAIN, str(config), f"checkpoint.path={folder}", options=OPTIONS)
    slurm.wait(job, "COMPLETED")
    return losses(folder)


def test_bad_nodes_are_left_out(slurm: Slurm, saving: Path, tmp_path: Path) -> None:
    """Two nodes kill their ranks, each at a later iteration, and the user has excluded a fourth. When the
    second has failed only one other is left: the first comes back, and the run is done there."""
    run, logs = tmp_path / "run", tmp_path / "ranks"
    faults = [{"kind": "kill", "host": f"n{i}", "iteration": 4 * i - 2} for i in (2, 3)]
    environment = {"RANK_LOGS": str(logs), "MAX_RESTARTS": "1", VARIABLE: json.dumps(faults)}
    options = (*OPTIONS, "--exclude=n4")
    job = slurm.submit(TRAIN, str(saving), options=options, environment=environment)
    for failures, out in enumerate(("n4,n2", "n4,n3"), 1):
        slurm.wait_for_requeue(job, failures)
        slurm.wait_until(lambda out=out: slurm.job(job)["ExcNodeList"] == out, job, seconds=10)
    slurm.wait(job, "COMPLETED", restarts=2)
    said = slurm.output(job)
    for line in (
        f"failed (n2: rank 1 was the first to end early, by status 137); job {job} goes back to the queue, "
        "without n4,n2\n",
        "only 1 other nodes, and the job takes 2: n2 is not left out\n",
        *(f"resumed from {run} at iteration {iteration}" for iteration in (4, 8)),
    ):
        assert line in said, said
    starts = history(logs, job)
    assert [(start["nodes"], start["how"], start["saved"], start["excluded"]) for start in starts] == [
        ("n[1-2]", "failed", 4, "n2"),
        ("n[1,3]", "failed", 8, "n3"),
        ("n[1-2]", "finished", ITERATIONS, ""),
    ]
    assert losses(run) == uninterrupted(slurm, saving, tmp_path / "clean")


def test_a_node_that_dies(slurm: Slurm, saving: Path, tmp_path: Path) -> None:
    """Whether Slurm or the job sees it first, the job ends on other nodes, and its history names the node."""
    run, logs = tmp_path / "run", tmp_path / "ranks"
    environment = {"RANK_LOGS": str(logs), "RDZV_SECONDS": "10"}
    settings = ("training.train_iterations=40",)
    job = slurm.submit(TRAIN, str(saving), *settings, options=OPTIONS, environment=environment)
    slurm.wait_until(lambda: len(losses(run)) > SAVES_EVERY, job)
    slurm.kill_node("n2")
    try:
        slurm.wait_for_requeue(job)
        slurm.wait(job, "COMPLETED", restarts=1)
    finally:
        slurm.start_node("n2")
        slurm.wait_for_nodes()
    first, last = history(logs, job)
    assert first["nodes"] == "n[1-2]" and first["how"] in ("failed", "gone") and "n2" in first["why"]
    assert (last["how"], last["saved"]) == ("finished", 40) and last["nodes"] in ("n[1,3]", "n[3-4]")
    assert [iteration for iteration, _ in losses(run)] == list(range(1, 41))

"""A node that fails again and again, one that stands still and one that dies: the job goes on from its
checkpoint on others."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.resilience.faults import VARIABLE
from tests.cluster.conftest import OPTIONS, TRAIN
from tests.cluster.slurm import Slurm
from tests.paths import REPO

pytestmark = pytest.mark.slow
ITERATIONS, SAVES_EVERY = 14, 4
SLURMD_SECONDS = 20  # until it has cleared a job away that was cut off; Slurm itself waits for two minutes
WITHOUT_N2 = ("n[1,3]", "n[1,4]", "n[3-4]")  # two nodes


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


def rank_on(slurm: Slurm, node: str) -> int:
    """The process that trains there."""
    there = slurm.processes(node)
    launchers = {p.pid for p in there if "megatron_eagle.runtime.torchrun" in (p.info["cmdline"] or [])}
    return next(p.pid for p in there if p.info["ppid"] in launchers)


def test_a_node_that_stands_still(slurm: Slurm, saving: Path, tmp_path: Path) -> None:
    """A rank is stopped, as on a file system that hangs: the others name its host, and the job goes on
    without it. So does the next stage of its chain."""
    sections = yaml.safe_load(saving.read_text())
    sections["training"] |= {"train_iterations": 40}
    sections["resilience"] = {"heartbeat_seconds": 1, "hang_minutes": 0.4}
    sections["stages"] = {name: {"optimizer": {"lr": lr}} for name, lr in (("one", 1e-5), ("two", 2e-5))}
    sections["stages"]["two"]["training"] = {"train_iterations": 2}
    saving.write_text(yaml.safe_dump(sections))
    logs = tmp_path / "ranks"
    submit = (str(TRAIN.with_name("progressive.sh")), str(saving), *OPTIONS)
    environment = {"RANK_LOGS": str(logs), "MAX_RESTARTS": "0"}
    chain = slurm.call(*submit, f"--output={slurm.folder}/job-%j.out", environment=environment)
    first, second = (int(line.rpartition(" ")[2]) for line in chain.stdout.splitlines())
    run = tmp_path / "run" / "one"
    slurm.wait_until(lambda: len(losses(run)) > SAVES_EVERY, first)
    os.kill(rank_on(slurm, "n2"), signal.SIGSTOP)
    slurm.wait_for_requeue(first)
    slurm.wait(first, "COMPLETED", restarts=1)
    report = (run / "logs" / "hang.txt").read_text()
    assert report.startswith("silent (process gone or stopped): rank 1 on n2 "), report
    stopped, finished = history(logs, first)
    assert (stopped["how"], stopped["excluded"]) == ("failed", "n2") and "rank 1 on n2" in stopped["why"]
    assert finished["how"] == "finished" and finished["nodes"] in WITHOUT_N2
    assert [iteration for iteration, _ in losses(run)] == list(range(1, 41))
    said = f"job {second}, which waits for this one, goes without n2, too\n"
    assert said in slurm.output(first), slurm.output(first)
    assert slurm.wait(second, "COMPLETED")["NodeList"] in WITHOUT_N2


# A job of starts that only fail; what else they are is in the quick tests.
FAILING = """#!/bin/bash
#SBATCH --open-mode=append
set -euo pipefail
cd "$REPO"
logs=$RANK_LOGS LAUNCH=srun
source examples/launch.sh
source examples/slurm/requeue.sh
begin_history
case ${SLURM_RESTART_COUNT:-0} in
    0) requeue failed "failed" n2 ;;
    1) requeue failed "failed again" ;;
esac
end_history finished finished
"""


# Each start goes on when it is told to.
CUT_OFF = """#!/bin/bash
#SBATCH --open-mode=append
set -euo pipefail
cd "$REPO"
logs=$RANK_LOGS LAUNCH=srun start=${SLURM_RESTART_COUNT:-0}
source examples/launch.sh
source examples/slurm/requeue.sh
begin_history
touch "$logs/began-$start"
until [[ -e $logs/go-$start ]]; do sleep 0.2; done
[[ $start == 2 ]] || requeue failed "failed"
end_history finished finished
"""


def test_a_node_that_was_cut_off_leaves_the_job_alone(slurm: Slurm, tmp_path: Path) -> None:
    """Its script ends behind the next start's back, which goes on elsewhere; later the job may come back."""
    script, logs = tmp_path / "cut_off.sh", tmp_path / "ranks"
    script.write_text(CUT_OFF)
    logs.mkdir()
    environment = {"RANK_LOGS": str(logs), "REPO": str(REPO)}
    others = "n3,n4"
    job = slurm.submit(script, options=("--nodes=1", "--exclusive", "--nodelist=n1"), environment=environment)

    def begun(start: int) -> None:
        slurm.wait_until((logs / f"began-{start}").exists, job)

    try:
        begun(0)
        slurm.call("scontrol", "update", f"NodeName={others}", "State=DRAIN", "Reason=test")
        with slurm.cut("n1"):
            slurm.wait(job, "PENDING", restarts=1)
            slurm.call("scontrol", "update", f"JobId={job}", "ReqNodeList=", "StartTime=now+2")
            begun(1)
        (logs / "go-0").touch()
        # Slurm ends it where it sees the node first.
        ends = (f"Slurm itself has requeued job {job}: this start", f"JOB {job} ON n1 CANCELLED")
        slurm.wait_until(lambda: any(line in slurm.output(job) for line in ends), job, seconds=120)
        slurm.wait_until(lambda: "idle" in slurm.call("sinfo", "-h", "-n", "n1", "-o", "%T").stdout, job)
        assert (slurm.job(job)["NodeList"], slurm.job(job)["Restarts"]) == ("n2", "1")
        slurm.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        time.sleep(SLURMD_SECONDS)
        for start in (1, 2):
            (logs / f"go-{start}").touch()
        slurm.wait_for_requeue(job, 2)
        slurm.wait(job, "COMPLETED", restarts=2, seconds=90)
    finally:
        slurm.call("scontrol", "update", f"NodeName=n2,{others}", "State=RESUME", check=False)
        slurm.wait_for_nodes()
    assert [(start["nodes"], start["how"]) for start in history(logs, job)] == [
        ("n1", "gone"),
        ("n2", "failed"),
        ("n1", "finished"),
    ]


def test_a_range_of_nodes_that_shrank_gets_them_back(slurm: Slurm, tmp_path: Path) -> None:
    """It runs on one node, since the others are left out or drained, and takes two where there are two."""
    script = tmp_path / "failing.sh"
    script.write_text(FAILING)
    logs = tmp_path / "ranks"
    logs.mkdir()
    environment = {"RANK_LOGS": str(logs), "REPO": str(REPO)}
    job = slurm.submit(
        script, options=("--nodes=1-2", "--exclusive", "--exclude=n4"), environment=environment
    )
    slurm.wait(job, "PENDING", restarts=1)
    try:
        slurm.call("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
        for restarts in (1, 2):
            slurm.wait_for_requeue(job, restarts)
        slurm.wait(job, "COMPLETED", restarts=2)
    finally:
        slurm.call("scontrol", "update", "NodeName=n3", "State=RESUME")
    starts = history(logs, job)
    assert [start["nodes"] for start in starts] == ["n[1-2]", "n1", "n[1-2]"], slurm.output(job)
    assert "only 1 other nodes, and the job takes 2: n2 is not left out\n" in slurm.output(job)
    assert [start["excluded"] for start in starts] == ["n2", "", ""]

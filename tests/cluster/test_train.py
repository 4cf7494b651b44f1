"""examples/slurm/train.sbatch on a real Slurm: stopped, requeued by itself, gone on with."""

from pathlib import Path

import pytest

from megatron_eagle.checkpoint import read_train_state
from megatron_eagle.training.monitoring.metrics import read_metrics
from tests.cluster.conftest import OPTIONS, TRAIN
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.slow


def iterations(run: Path) -> list[int]:
    """Those that its log has, in its order."""
    file = run / "logs" / "metrics.jsonl"
    return [line.iteration for line in read_metrics(file)] if file.exists() else []


def test_time_is_nearly_over(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    """The signal reaches the batch script alone; the run saves, and the same job ends it after a requeue."""
    run = tmp_path / "run"
    job = slurm.submit(TRAIN, str(config), "training.stop_at_iteration=60", options=OPTIONS)
    slurm.wait_until(lambda: len(iterations(run)) >= 2, job)
    slurm.call("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait_for_requeue(job)
    stopped = read_train_state(run).iteration
    assert 2 <= stopped < 60
    slurm.wait(job, "COMPLETED", restarts=1)
    assert f"at iteration {stopped}" in slurm.output(job)
    assert iterations(run) == list(range(1, 61))

"""One run whose ranks are killed again and again: torchrun starts all of them anew, and nothing of it is seen
in the losses. No Slurm is needed; it stands here for its time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.resilience.faults import VARIABLE
from tests.cluster.conftest import LENGTH
from tests.paths import REPO

RANKS, SAVES_EVERY = 4, 4
MOMENTS = ("kill", "kill_late", "kill_start", "kill_save")


def faults(marks: Path, rounds: int) -> list[dict[str, object]]:
    """A kill for each attempt: in each round each moment once, and each rank."""
    suffered, iteration = [], 2
    for attempt in range(rounds * len(MOMENTS)):
        turn, number = divmod(attempt, len(MOMENTS))
        kind = MOMENTS[number]
        if kind == "kill_start":
            at = attempt
        else:
            # Also behind the last checkpoint; a save is at a multiple of its interval.
            iteration += 3
            iteration += -iteration % SAVES_EVERY if kind == "kill_save" else 0
            at = iteration
        rank = (number + turn) % RANKS
        suffered.append(
            {"kind": kind, "rank": rank, "iteration": at, "once": str(marks / f"fault_{attempt}")}
        )
    return suffered


def run(
    folder: Path, data: Path, iterations: int, suffered: list[dict[str, object]]
) -> tuple[str, list[float]]:
    """What torchrun and its ranks print, and the losses in the log."""
    config = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(data), "length": LENGTH},
        "training": {"train_iterations": iterations, "global_batch_size": 4, "precision": "fp32"},
        "checkpoint": {"path": str(folder / "run"), "save_interval": SAVES_EVERY, "keep_last": 2},
        "logging": {"progress": False, "tensorboard": False},
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    result = subprocess.run(
        [
            *torchrun,
            f"--max-restarts={len(suffered)}",
            "tools/train.py",
            "run",
            "--config",
            str(folder / "run.yaml"),
        ],
        cwd=REPO,
        env=os.environ
        | {
            "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
            "PYTHONWARNINGS": "ignore",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            VARIABLE: json.dumps(suffered),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stderr, [line.loss for line in read_metrics(folder / "run" / "logs" / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rounds",
    [2, pytest.param(4, marks=pytest.mark.soak)],
    ids=["each rank twice", "each rank in each moment"],
)
def test_every_kill_is_survived(rounds: int, data: Path, tmp_path: Path) -> None:
    suffered = faults(tmp_path, rounds)
    assert len({(fault["kind"], fault["rank"]) for fault in suffered}) == 4 * rounds
    iterations = 12 * rounds + 2
    _, clean = run(tmp_path / "clean", data, iterations, [])
    said, losses = run(tmp_path / "killed", data, iterations, suffered)
    assert all(Path(str(fault["once"])).exists() for fault in suffered), "each of them has killed"
    of_starts = sum(fault["kind"] == "kill_start" for fault in suffered)
    assert said.count("resumed from") == len(suffered) - of_starts
    assert len(losses) == iterations and losses == clean

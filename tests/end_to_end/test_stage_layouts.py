"""`tools/train.py run` on stages: one with Ulysses, then one without, in the same processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.training.monitoring.metrics import read_metrics
from tests.parallel.harness import launch
from tests.parallel.store_cells import LENGTH, write_store
from tests.paths import REPO
from tests.training.test_training import train_main


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """The file, beside its data. Both stages see the same packs."""
    folder = tmp_path_factory.mktemp("stages")
    store = write_store(folder)
    manifest = SampleStore(store).manifest
    sections = {
        "model": {
            "preset": "tiny",
            "vision": {"image_size": manifest.tile_size, "patch_size": manifest.patch_size},
        },
        "data": {"path": str(store), "length": LENGTH},
        "training": {"train_iterations": 3, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "lr_warmup_iterations": 0},
        "checkpoint": {"path": str(folder / "run")},
        "logging": {"progress": False, "tensorboard": False},
        "stages": {
            "one": {"parallel": {"context_parallel_size": 2, "ulysses_parallel_size": 2}},
            "two": {"parallel": {}},
        },
    }
    (folder / "stages.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
    return folder / "stages.yaml"


def train(*arguments: str) -> None:
    """On each rank: tools/train.py as torchrun starts it."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    with patch.dict(os.environ, environment), patch.object(sys, "argv", ["train.py", "run", *arguments]):
        assert train_main()() == 0


def steps(run: Path) -> list[tuple[int, float, float]]:
    return [(m.iteration, m.loss, m.grad_norm) for m in read_metrics(run / "two" / "logs" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def both(stages) -> list[tuple[int, float, float]]:
    """What the second stage logged in the processes of the first."""
    launch(train, 2, "--config", str(stages))
    return steps(stages.parent / "run")


def second_alone(stages: Path, processes: int) -> list[tuple[int, float, float]]:
    """What the second stage logs in processes of its own, from the first one's checkpoint."""
    run = stages.parent / f"second_{processes}"
    shutil.copytree(stages.parent / "run" / "one", run / "one")
    launch(train, processes, "--config", str(stages), "--stage", "two", f"checkpoint.path={run}")
    return steps(run)


def test_the_second_stage_is_that_of_fresh_processes(stages, both):
    assert [iteration for iteration, *_ in both] == [1, 2, 3]
    assert second_alone(stages, processes=2) == both, "to the last bit"


def test_the_second_stage_is_that_of_one_process(stages, both):
    for found, expected in zip(both, second_alone(stages, processes=1), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("program", [["tools/train.py"], ["-m", "megatron_eagle", "train"]], ids=len)
def test_under_torchrun(stages, both, program):
    run = stages.parent / f"torchrun_{len(program)}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["run", "--config", str(stages), f"checkpoint.path={run}"]
    subprocess.run([sys.executable, *launcher, *program, *words], cwd=REPO, check=True)
    assert steps(run) == both

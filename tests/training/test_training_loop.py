"""The training loop over made-up packs: resume, pipelines, stopping, what it writes."""

import json
import math
import shutil
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
import yaml

from megatron_eagle.checkpoint import saver
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.parallel.harness import launch
from tests.training.synthetic_data import LENGTH, SyntheticLoader, write_manifest

CONFIG = {
    "model": {"preset": "tiny"},
    "training": {"train_iterations": 6, "global_batch_size": 4, "precision": "fp32"},
    "optimizer": {"lr": 5e-3, "lr_warmup_fraction": 0.2},
    "logging": {"progress": False, "tensorboard": False},
}


def train_rank(config: str, world_size: int, overrides: list[str]) -> tuple[int, int]:
    """On each rank: `train` with the synthetic loader."""
    run = load_run_config(config, overrides, world_size=world_size)
    state = train(run, open_loader=SyntheticLoader)
    return state.iteration, state.consumed_packs


def write_run(folder: Path, data: str = "data") -> None:
    """`folder` gets a run.yaml that saves in `run` beside it, and the data's manifest."""
    write_manifest(folder / data)
    sections = {
        "data": {"path": str(folder / data), "length": LENGTH},
        "checkpoint": {"path": str(folder / "run")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **sections}))


@pytest.fixture
def job(tmp_path):
    """`job(*overrides, world_size=1)` trains in `tmp_path / "run"` and returns its metrics."""
    write_run(tmp_path)

    def run(*overrides: str, world_size: int = 1):
        config = str(tmp_path / "run.yaml")
        if world_size == 1:
            train_rank(config, 1, list(overrides))
        else:
            launch(train_rank, world_size, config, world_size, list(overrides))
        return read_metrics(tmp_path / "run" / "logs" / "metrics.jsonl")

    run.root = tmp_path / "run"
    return run


def values(metrics) -> list[tuple]:
    return [(m.iteration, m.loss, m.grad_norm, m.lr, m.tokens) for m in metrics]


def test_keys_round_a_ring_train_as_one_process_and_are_logged(job):
    short = ["training.stop_at_iteration=2", "checkpoint.save_interval=2"]
    one = job(*short)
    shutil.rmtree(job.root)
    context = ["parallel.context_parallel_size=2", "parallel.context_parallel_comm=p2p"]
    ring = job(*short, *context, world_size=2)
    assert [m.loss for m in ring] == pytest.approx([m.loss for m in one], rel=1e-5)
    assert [m.packs_by_exchange for m in ring] == [{"ring": 1.0}] * 2
    assert [m.packs_by_exchange for m in one] == [{}] * 2


def test_stopped_and_resumed_equals_uninterrupted(job):
    whole = job("checkpoint.save_interval=2")
    assert sorted(path.name for path in job.root.iterdir() if path.is_dir()) == [
        "hf",
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
        "logs",
    ]
    assert (job.root / "hf" / "tokenizer.json").is_file()
    assert [m.iteration for m in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[-1].loss < whole[0].loss and whole[0].tokens == 4 * LENGTH
    shutil.rmtree(job.root)

    stopped = job("training.stop_at_iteration=3")
    assert values(stopped) == values(whole[:3])
    # A line of an iteration that was not saved, and one cut by a kill, must not survive the resume.
    with open(job.root / "logs" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**vars(stopped[-1]), "iteration": 4}) + '\n{"iteration": 5, "lo')
    assert values(job()) == values(whole)


@pytest.mark.parametrize(
    "parallel",
    [
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.context_parallel_size=2"],
        pytest.param(["parallel.tensor_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),
    ],
    ids=["vpp", "cp", "tp", "dp"],
)
def test_rank_0_logs_the_global_loss_in_every_layout(job, parallel, one_process):
    metrics = job("training.stop_at_iteration=2", *parallel, world_size=2)
    for (loss, norm), found in zip(one_process, metrics, strict=True):
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(norm, rel=1e-5)
        assert (found.samples, found.packing) == (4, 40 / LENGTH), "each pack is counted once"
        assert found.tokens_by_length == {"512": 1.0} and found.host_memory_gib > 0


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Loss and gradient norm of two iterations in one process."""
    folder = tmp_path_factory.mktemp("one")
    write_run(folder)
    train_rank(str(folder / "run.yaml"), 1, ["training.stop_at_iteration=2"])
    return [(m.loss, m.grad_norm) for m in read_metrics(folder / "run" / "logs" / "metrics.jsonl")]


def test_the_logged_learning_rate_is_that_without_multipliers(job):
    """Also where every part has one, and so none of the optimizer's groups the run's own rate."""
    settings = ["training.stop_at_iteration=2", "optimizer.lr_warmup_fraction=0"]
    [_, second] = job(*settings, "optimizer.lr_multipliers={vision: 2, connector: 3, language: 0.5}")
    assert second.lr == pytest.approx(5e-3 * (1 + math.cos(math.pi / 6)) / 2)


def test_bf16_and_start_from_weights(job, tmp_path):
    first = job("training.precision=bf16", "training.stop_at_iteration=2")
    other = [f"checkpoint.load={job.root}", f"checkpoint.path={tmp_path / 'second'}"]
    job("training.precision=bf16", "training.stop_at_iteration=1", *other)
    second = read_metrics(tmp_path / "second" / "logs" / "metrics.jsonl")
    assert second[0].iteration == 1 and second[0].loss < first[0].loss
    assert (tmp_path / "second" / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_loss_that_is_not_finite_stops_the_run(async_save, job, tmp_path):
    """Which says what is saved: it waits for a save under way."""
    write_run(tmp_path, data="broken")
    message = r"iteration 3: the loss is nan; stopped \(iteration 2 is saved\)"
    with pytest.raises(AgreedError, match=message):
        job("checkpoint.save_interval=2", f"checkpoint.async_save={async_save}")
    assert len(read_metrics(job.root / "logs" / "metrics.jsonl")) == 2


def test_a_save_that_fails_is_reported_and_training_goes_on(job, capsys):
    """Until the last one, which has to succeed."""
    write, calls = saver.write_snapshot, iter([1, 2, 3])

    def fail_second(*arguments):
        if next(calls) == 2:
            raise AgreedError("run: iteration 4 could not be saved: No space left on device")
        return write(*arguments)

    with patch.object(saver, "write_snapshot", fail_second):
        metrics = job("checkpoint.save_interval=2", "checkpoint.keep_last=2")
    assert len(metrics) == 6
    assert [path.name for path in sorted(job.root.glob("iter_*"))] == ["iter_0000002", "iter_0000006"]
    assert "iteration 4: failed_save: run: iteration 4 could not be saved" in capsys.readouterr().err
    with (
        patch.object(saver, "write_snapshot", side_effect=AgreedError("no space")),
        pytest.raises(AgreedError, match="no space"),
    ):
        shutil.rmtree(job.root)
        job("training.stop_at_iteration=1")


def _logs_apart(config: str, folders: list[str]) -> str:
    """Each rank with its own folder for logs; returns the error that ends the run."""
    here = folders[torch.distributed.get_rank()]
    with pytest.raises(AgreedError) as refused:
        train_rank(config, 2, [f"logging.path={here}", "training.stop_at_iteration=1"])
    return str(refused.value)


def test_a_run_that_saves_nothing(job):
    """As `bench.py train_gpu` starts it, whose states would be 1 TB; its steps are the same."""
    steps = job("checkpoint.save=false", "training.stop_at_iteration=2")
    assert [path.name for path in sorted(job.root.iterdir())] == ["hf", "logs"]
    shutil.rmtree(job.root)
    assert values(job("training.stop_at_iteration=2")) == values(steps)
    assert (job.root / "latest_checkpointed_iteration.txt").exists()
    with pytest.raises(UserError, match="checkpoint.*save is false: leave out save_interval and async_save"):
        job("checkpoint.save=false", "checkpoint.save_interval=2")


def test_what_one_rank_cannot_write_ends_the_run_on_all(tmp_path):
    write_run(tmp_path)
    (tmp_path / "file").touch()
    folders = [str(tmp_path / "logs"), str(tmp_path / "file" / "logs")]
    errors = launch(_logs_apart, 2, str(tmp_path / "run.yaml"), folders)
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{folders[1]}/heartbeat: cannot write heartbeats here")


def _with_ballast(config: str, gib: float) -> float:
    """Trains while the last rank holds so much more memory; returns the rank's own GiB after it."""
    ballast = torch.ones(int(gib * 2**28) if torch.distributed.get_rank() == 1 else 0)
    train_rank(config, 2, ["training.stop_at_iteration=2"])
    own = psutil.Process().memory_info().rss / 2**30
    del ballast
    return own


def test_the_logged_memory_is_that_of_the_rank_that_has_most(tmp_path):
    write_run(tmp_path)
    first, last = launch(_with_ballast, 2, str(tmp_path / "run.yaml"), 0.75)
    assert last > first + 0.6
    metrics = read_metrics(tmp_path / "run" / "logs" / "metrics.jsonl")
    assert metrics[-1].host_memory_gib == pytest.approx(last, rel=0.15)

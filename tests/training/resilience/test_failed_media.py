"""A run whose media fail: samples left out everywhere, or one line everywhere; steps without any sample."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_eagle.data.loading.packs import FailedMedium
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.metrics import read_events, read_metrics
from megatron_eagle.training.resilience import faults
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.parallel.harness import launch
from tests.training.synthetic_data import SyntheticLoader
from tests.training.test_training_loop import train_rank, write_run

SKIP, SHORT = "data.on_media_error=skip", "training.stop_at_iteration=3"


def train_faulty(config: str, world_size: int, overrides: list[str], suffered: list[dict]) -> str:
    """On each rank: train with faults -> the error, if any."""
    with patch.dict(os.environ, {faults.VARIABLE: json.dumps(suffered)}):
        try:
            train_rank(config, world_size, overrides)
        except AgreedError as error:
            return str(error)
    return ""


def steps(logs: Path) -> list[tuple]:
    return [(m.iteration, m.loss, m.grad_norm) for m in read_metrics(logs / "metrics.jsonl")]


@pytest.fixture
def run(tmp_path):
    """`run(faults, *overrides)` trains; then `run.metrics()` and `run.events()`."""

    def start(suffered: list[dict], *overrides: str, world_size: int = 1) -> list[str]:
        write_run(tmp_path)
        config = str(tmp_path / "run.yaml")
        return launch(train_faulty, world_size, config, world_size, list(overrides), suffered)

    logs = tmp_path / "run" / "logs"
    start.metrics = lambda: steps(logs)
    start.events = lambda: [(e["iteration"], e["event"]) for e in read_events(logs / "events.jsonl")]
    start.file, start.logs = tmp_path / "run.yaml", logs
    return start


def bad(iteration: int, *samples: int, **where: int) -> dict:
    return {"kind": "bad_media", "iteration": iteration, "samples": samples, **where}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The steps of one process that has lost sample 1 of the second global batch."""
    folder = tmp_path_factory.mktemp("one")
    write_run(folder)
    train_faulty(str(folder / "run.yaml"), 1, [SKIP, SHORT], [bad(2, 1)])
    return [
        (m.iteration, m.loss, m.grad_norm) for m in read_metrics(folder / "run" / "logs" / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("rank", "parallel"),
    [(1, []), (0, ["parallel.pipeline_model_parallel_size=2"]), (1, ["parallel.context_parallel_size=2"])],
    ids=["dp", "pp", "cp"],
)
def test_what_one_rank_loses_all_leave_out(run, expected, rank, parallel):
    assert run([bad(2, 1, rank=rank)], SKIP, SHORT, *parallel, world_size=2) == ["", ""]
    assert [m[0] for m in run.metrics()] == [1, 2, 3]
    for found, wanted in zip(run.metrics(), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert run.events() == [(2, "failed_media")]
    [event] = read_events(run.logs / "events.jsonl")
    assert (
        event["reason"] == "a fault for tests; used by row -1 of the store (none)" and event["path"] == "none"
    )


def test_a_failed_medium_ends_the_run_by_default(run):
    first, second = run([bad(2, 1, 3, rank=1)], SHORT, world_size=2)
    assert first == second
    assert first.startswith("a fault for tests; used by row -1 of the store (none) (and 1 more samples). ")
    assert "data.on_media_error=skip" in first and len(run.metrics()) == 1


def test_a_step_without_any_sample_is_skipped(run):
    assert run([bad(2, 0, 1, 2, 3)], SKIP, SHORT) == [""]
    assert [m[0] for m in run.metrics()] == [1, 3]
    assert run.events() == [(2, "failed_media")] * 4 + [(2, "skipped")]
    assert all(loss > 0 for _, loss, _ in run.metrics())


def test_not_without_end(run):
    nothing = [bad(iteration, 0, 1, 2, 3) for iteration in (1, 2)]
    [message] = run(nothing, SKIP, SHORT, "resilience.max_consecutive_skips=1")
    assert "no sample of this step has weight in the loss, after 1 skipped steps in a row" in message


class BrokenLoader(SyntheticLoader):
    """Its second global batch cannot be put together on the last rank."""

    def step(self, consumed_packs):
        if consumed_packs == self._batch and self._rank == 1:
            raise UserError("the store is damaged")
        return super().step(consumed_packs)


class HalfBrokenLoader(SyntheticLoader):
    """Held-out data of two global batches; two samples of the first are lost."""

    packs_per_epoch = 8

    def __init__(self, config, **settings):
        super().__init__(config, **settings)
        self._held_out = not config.prefetch

    def step(self, consumed_packs):
        batch = super().step(consumed_packs)
        if self._held_out and consumed_packs == 0:
            lost = {i: FailedMedium(i, "data.jsonl:1", "a.png", "missing media") for i in (0, 1)}
            batch = replace(batch, failures=lost)
        return batch


def train_with(loader: str, config: str, world_size: int, overrides: list[str]) -> str:
    try:
        run = load_run_config(config, overrides, world_size=world_size)
        train(run, open_loader=globals()[loader])
    except AgreedError as error:
        return str(error)
    return ""


def test_an_error_of_one_loader_ends_all(run, tmp_path):
    write_run(tmp_path)
    ended = launch(train_with, 2, "BrokenLoader", str(run.file), 2, [SHORT])
    assert ended == ["the store is damaged"] * 2


def test_an_evaluation_leaves_out_too(run, tmp_path):
    """With weights that do not move: as training loses the same samples of the same packs."""
    still = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", "training.stop_at_iteration=2"]
    assert run([bad(1, 0, 1)], SKIP, *still) == [""]
    losses = [loss for _, loss, _ in run.metrics()]
    (tmp_path / "evaluated").mkdir()
    write_run(tmp_path / "evaluated")
    config, logs = tmp_path / "evaluated" / "run.yaml", tmp_path / "evaluated" / "run" / "logs"
    evaluating = [f"evaluation.data={tmp_path / 'data'}", "evaluation.interval=2"]
    settings = [SKIP, *still, *evaluating]
    assert launch(train_with, 1, "HalfBrokenLoader", str(config), 1, settings) == [""]
    lost = [(e["iteration"], e["reason"]) for e in read_events(logs / "events.jsonl")]
    assert lost == [(2, f"missing media; used by row {row} of the store (data.jsonl:1)") for row in (0, 1)]

    def weight(*positions: int) -> float:
        return sum(float(SyntheticLoader.weights(i).sum()) for i in positions)

    weights = weight(2, 3), weight(4, 5, 6, 7)
    expected = sum(loss * share for loss, share in zip(losses, weights, strict=True)) / sum(weights)
    assert read_metrics(logs / "metrics.jsonl")[-1].evaluation_loss == pytest.approx(expected, rel=1e-6)

"""The evaluation loss is that of one global batch with all held-out packs, in every layout."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import FailedMedium, no_tiles
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.errors import UserError
from megatron_eagle.training.evaluation import EvaluationConfig, HeldOut
from megatron_eagle.training.monitoring.metrics import (
    EvaluationMetrics,
    StepMetrics,
    read_metrics,
    read_steps,
)
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import standard_observers, train
from tests.checkpoint.contents import different, read_whole
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.parallel.harness import launch
from tests.training.synthetic_data import SyntheticLoader, write_manifest
from tests.training.test_training_loop import write_run

FROZEN = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", "training.stop_at_iteration=2"]


class HeldOutLoader(SyntheticLoader):
    """Two global batches, the packs that training reads; the second weighs three times the first."""

    packs_per_epoch = 9

    def step(self, consumed_packs):
        batch = super().step(consumed_packs)
        return replace(batch, total=1.0 if consumed_packs == 0 else 3.0)


def train_evaluating(config: str, world_size: int, overrides: list[str]) -> None:
    train(load_run_config(config, overrides, world_size=world_size), open_loader=HeldOutLoader)


class Heard(Observer):
    """The evaluations that a run tells of."""

    def __init__(self) -> None:
        self.losses = []

    def evaluation(self, metrics):
        self.losses.append(metrics.evaluation_loss)


@pytest.mark.parametrize(
    "parallel",
    [
        [],
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        pytest.param(["parallel.tensor_model_parallel_size=2"], marks=pytest.mark.slow),
        pytest.param(["parallel.context_parallel_size=2"], marks=pytest.mark.slow),
    ],
    ids=["one", "vpp", "tp", "cp"],
)
def test_the_loss_of_all_packs_together(tmp_path, parallel):
    """With weights that do not move: the training losses of the same packs, by their share of all weights."""
    write_run(tmp_path)
    overrides = [f"evaluation.data={tmp_path / 'data'}", "evaluation.interval=1", *FROZEN, *parallel]
    size = 2 if parallel else 1
    launch(train_evaluating, size, str(tmp_path / "run.yaml"), size, overrides)
    records = read_metrics(tmp_path / "run" / "logs" / "metrics.jsonl")
    assert [type(record) for record in records] == [StepMetrics, EvaluationMetrics] * 2
    first, evaluated, second, again = records
    assert [record.iteration for record in records] == [1, 1, 2, 2]
    assert first.loss != pytest.approx(second.loss, rel=1e-4)
    expected = 0.25 * first.loss + 0.75 * second.loss
    assert evaluated.evaluation_loss == pytest.approx(expected, rel=1e-6)
    assert again.evaluation_loss == pytest.approx(expected, rel=1e-6)


def test_the_evaluation_after_a_skipped_step_is_logged(tmp_path, capsys):
    write_run(tmp_path, data="broken")  # the third iteration's loss is NaN
    write_manifest(tmp_path / "held-out")
    overrides = [
        f"evaluation.data={tmp_path / 'held-out'}",
        "evaluation.interval=3",
        "evaluation.batches=1",
        "resilience.on_nonfinite=skip",
        "training.stop_at_iteration=3",
    ]
    heard, config = Heard(), load_run_config(tmp_path / "run.yaml", overrides, world_size=1)
    train(config, open_loader=HeldOutLoader, observe=lambda run: [heard, *standard_observers(run)])
    logs = tmp_path / "run" / "logs"
    first, second, evaluated = read_metrics(logs / "metrics.jsonl")
    assert [first.iteration, second.iteration, evaluated.iteration] == [1, 2, 3]
    assert isinstance(evaluated, EvaluationMetrics)
    assert heard.losses == [evaluated.evaluation_loss]
    assert [json.loads(line)["event"] for line in (logs / "events.jsonl").open()] == ["skipped"]
    assert f"iteration 3: evaluation loss {evaluated.evaluation_loss:.4f}" in capsys.readouterr().err

    # Resumed, the run has this evaluation and the skip once, and evaluates again where it ends.
    train_evaluating(str(tmp_path / "run.yaml"), 1, [*overrides, "training.stop_at_iteration=4"])
    records = read_metrics(logs / "metrics.jsonl")
    assert [m.iteration for m in records if isinstance(m, EvaluationMetrics)] == [3, 4]
    assert records[:3] == [first, second, evaluated]
    assert [m.iteration for m in read_steps(logs / "metrics.jsonl")] == [1, 2, 4]


class FailingLoader(HeldOutLoader):
    """One rank alone cannot read a medium, each time."""

    def step(self, consumed_packs):
        lost = {0: FailedMedium(3, "data.jsonl:1", "a.png", "missing media")} if dist.get_rank() == 1 else {}
        return replace(super().step(consumed_packs), failures=lost)

    def leave_out(self, batch, numbers):
        assert numbers == {0}
        return batch


def evaluate_failing(config: str, overrides: list[str]) -> None:
    train(load_run_config(config, overrides, world_size=2), open_loader=FailingLoader)


def test_media_that_one_rank_cannot_evaluate_are_left_out_by_all(tmp_path):
    """Otherwise the ranks wait for each other in different places."""
    write_run(tmp_path)
    overrides = [f"evaluation.data={tmp_path / 'data'}", "evaluation.batches=1", "evaluation.interval=1"]
    overrides += ["parallel.tensor_model_parallel_size=2", "training.stop_at_iteration=1"]
    overrides += ["data.on_media_error=skip"]
    launch(evaluate_failing, 2, str(tmp_path / "run.yaml"), overrides, timeout=60)
    events = [json.loads(line) for line in (tmp_path / "run" / "logs" / "events.jsonl").open()]
    assert [(event["event"], event["of"], event["row"]) for event in events] == [
        ("failed_media", "training", 3),
        ("failed_media", "evaluation", 3),
    ]


def test_weights_of_a_real_store_add_up_to_one(tmp_path):
    """Every token weighs what it would in one global batch with all packs."""
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(60)]
    store = make_store(tmp_path, make_tokenizer(tmp_path / "tokenizer"), records, (200,))
    write_packs(store, 200, seed=0)
    data = DataConfig(str(store), 200)
    open_loader = partial(
        PackLoader, global_batch_size=2, data_parallel_rank=0, data_parallel_size=1, plan=no_tiles
    )
    held_out = HeldOut(EvaluationConfig(str(store), 1), data, 2, open_loader)
    batches = list(held_out.batches(PackLoader.step))
    assert len(batches) >= 2
    total = sum(b.total for b in batches)
    weights = sum(
        b.total / total * float(pack.loss_weights.sum()) for b in batches for pack in b.microbatches
    )
    assert weights == pytest.approx(1, rel=1e-5)
    held_out.close()
    with pytest.raises(UserError, match="and 1 global batches of 500 are asked for"):
        HeldOut(EvaluationConfig(str(store), 1), data, 500, open_loader)


def test_parameters_that_are_gathered_late_are_evaluated_and_saved(tmp_path):
    """In bf16, where a step changes only a rank's own shard of them before they are gathered."""
    write_run(tmp_path)
    common = [f"evaluation.data={tmp_path / 'data'}", "evaluation.interval=2", "training.precision=bf16"]
    common += [
        "training.stop_at_iteration=4",
        "checkpoint.save_interval=3",
        "parallel.overlap_grad_reduce=true",
    ]
    found = []
    for late in ("false", "true"):
        root = tmp_path / late
        settings = [f"parallel.overlap_param_gather={late}", f"checkpoint.path={root}"]
        launch(train_evaluating, 2, str(tmp_path / "run.yaml"), 2, [*common, *settings])
        records = read_metrics(root / "logs" / "metrics.jsonl")
        losses = [getattr(record, "evaluation_loss", None) or record.loss for record in records]
        (root / "latest_checkpointed_iteration.txt").write_text("3")  # saved without an evaluation before
        found.append((losses, read_whole(root)))
    (losses, saved), (late_losses, late_saved) = found
    assert late_losses == losses and len(losses) == 6
    assert different(saved, late_saved) == []

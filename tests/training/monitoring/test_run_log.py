"""What a step is measured by, under the same names everywhere: files, TensorBoard, W&B, the progress line."""

import sys
from dataclasses import fields

import pytest
import torch

from megatron_eagle.context_parallel.exchange_choice import KeyUse
from megatron_eagle.data.loading.packs import PackedSample, TokenPack
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import training_flops
from megatron_eagle.model.presets import preset
from megatron_eagle.training.monitoring.metrics import NO_CURVES, EvaluationMetrics, StepMetrics, read_metrics
from megatron_eagle.training.monitoring.run_log import LoggingConfig, RunLog, WandbConfig, progress_line
from megatron_eagle.training.monitoring.step_totals import buckets, count_totals, read_totals, zero_totals

STEP = StepMetrics(
    iteration=3,
    loss=2.0,
    aux_loss=2.1,
    grad_norm=1.5,
    lr=1e-4,
    tokens=1000,
    seconds=0.5,
    tflops=10.0,
    mfu=0.5,
    data_seconds=0.125,
    mfu_vision=0.1,
    mfu_language=0.4,
    packing=0.75,
    samples=2,
    frames=8,
    frames_wanted=10,
    tiles=4,
    tiles_wanted=13,
    device_memory_gib=70.5,
    host_memory_gib=4.25,
    samples_by_length={"512": 0.5, "1024": 0.5},
    tokens_by_length={"512": 0.2, "1024": 0.8},
    packs_by_exchange={"gather": 0.75, "ring": 0.25},
    foreign_keys=0.5,
    exposed_transfer=0.02,
    loss_by_dataset={"a": 2.5, "b c/d": 1.0, "absent": None},
    share_by_dataset={"a": 0.5, "b c/d": 0.5, "absent": None},
    tokens_by_dataset={"a": 700, "b c/d": 50, "absent": None},
    first_pack=8,
    packs=4,
    data={"path": "data", "seed": 0},
)


EVALUATION = EvaluationMetrics(iteration=3, evaluation_loss=2.25)


def write_log(config: LoggingConfig, folder, *records, iteration: int = 0) -> None:
    with RunLog(config, folder, active=True, iteration=iteration, last_iteration=9) as log:
        for record in records:
            (log.step if isinstance(record, StepMetrics) else log.evaluation)(record)


def test_every_number_has_one_name():
    names = STEP.scalars().keys()
    whole = {name for name in names if "/" not in name}
    shares = {name.split("/")[0] for name in names if "/" in name}
    expected = {f.name for f in fields(StepMetrics)} - {*NO_CURVES, "evaluation_loss"}
    assert whole | shares == expected | {"tokens_per_second"}
    assert STEP.scalars()["tokens_per_second"] == 2000
    assert STEP.scalars()["tokens_by_length/1024"] == 0.8


def test_tensorboard_has_the_names_of_the_file(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_log(LoggingConfig(progress=False), tmp_path, STEP, EVALUATION)
    assert read_metrics(tmp_path / "metrics.jsonl") == [STEP, EVALUATION]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = STEP.scalars() | {"evaluation_loss": 2.25}
    assert set(board.Tags()["scalars"]) == {f"train/{name}" for name in scalars}
    for name, value in scalars.items():
        (event,) = board.Scalars(f"train/{name}")
        assert (event.step, event.value) == (3, pytest.approx(value))


def test_the_progress_line():
    assert progress_line(STEP) == (
        "loss 2.0000, aux loss 2.100, grad norm 1.500, lr 1.00e-04, 2,000 tokens/s, 0.50 s (0.12 data), "
        "packing 75.0%, keys gather 75% + ring 25% (50% foreign, 2% exposed), MFU 50.0% (10.0% vision), "
        "GPU 70.5 GiB, host 4.2 GiB"
    )
    assert progress_line(StepMetrics(1, 2.0, 1.0, 0.1, 8, 1.0, 0.1)) == (
        "loss 2.0000, grad norm 1.000, lr 1.00e-01, 8 tokens/s, 1.00 s (0.00 data)"
    )


def test_wandb_gets_the_names_of_tensorboard(tmp_path, wandb):
    config = LoggingConfig(progress=False, tensorboard=False, wandb=WandbConfig("eagle", mode="offline"))
    config.check(1)
    write_log(config, tmp_path, STEP, EVALUATION)
    write_log(config, tmp_path, iteration=3)
    first, second = wandb.started
    assert first["project"] == "eagle" and first["mode"] == "offline" and first["dir"] == str(tmp_path)
    assert first["id"] is None and second["id"] == "abc123", "a resumed run goes on with its curves"
    expected = {f"train/{name}": value for name, value in STEP.scalars().items()}
    assert wandb.logged == [(3, expected), (3, {"train/evaluation_loss": 2.25}), "finished", "finished"]


def test_wandb_without_a_key_is_one_line(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def refuse(**_):
        raise wandb.Error("api_key not configured (no-tty).\nmore lines")

    wandb.init = refuse
    config = LoggingConfig(progress=False, tensorboard=False, wandb=WandbConfig("eagle"))
    with pytest.raises(UserError) as caught:
        write_log(config, tmp_path, STEP)
    assert str(caught.value) == (
        "logging.wandb: api_key not configured (no-tty); set WANDB_API_KEY, or logging.wandb.mode=offline"
    )


def test_wandb_that_is_not_installed_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed; `pip install wandb`"):
        LoggingConfig(wandb=WandbConfig("eagle")).check(1)
    LoggingConfig().check(1)


def batch(lengths: list[int], length: int, **counts) -> TokenPack:
    """A pack of samples of these lengths, padded to `length`."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    bounds += [] if bounds[-1] == length else [length]
    empty = torch.empty(0)
    return TokenPack(
        input_ids=empty,
        labels=empty,
        loss_weights=empty,
        group_ids=empty,
        position_ids=empty,
        document_bounds=bounds,
        samples=[
            PackedSample(i, i, start, start + n)
            for i, (start, n) in enumerate(zip(bounds, lengths, strict=False))
        ],
        **counts,
    )


def test_totals_of_ranks_add_up():
    eagle = preset("tiny").with_data(vocab_size=504, image_token_index=7)
    settings = {"trainable": ("vision", "connector", "language"), "adapters": False}
    first = batch([100, 512, 700], 2000, n_tiles=9, n_frames=5, frames_wanted=8, tiles_wanted=6)
    second = batch([2000], 2000, n_tiles=0)
    keys = [KeyUse("ring", 100, 60, 900, 30), KeyUse("gather", 50, 15, 100, 70)]
    parts = [
        count_totals([pack], eagle, 2000, **settings, keys=[use])
        for pack, use in zip((first, second), keys, strict=True)
    ]
    totals = read_totals(sum(parts) + zero_totals(2000), 2000)
    together = count_totals([first, second], eagle, 2000, **settings, keys=keys)
    assert totals == read_totals(together, 2000)
    assert totals.packs_by_exchange == {"gather": 1, "ring": 1}
    assert (totals.keys, totals.foreign_keys) == (150, 75)
    assert (totals.attention_pairs, totals.exposed_pairs) == (1000, 100)
    assert (totals.samples, totals.tokens) == (4, 3312)
    assert (totals.frames, totals.frames_wanted, totals.tiles, totals.tiles_wanted) == (5, 8, 4, 6)
    assert totals.samples_by_length == {"512": 2, "1024": 1, "2000": 1}
    assert totals.tokens_by_length == {"512": 612, "1024": 700, "2000": 2000}
    flops = training_flops(
        eagle, tokens=3312, sum_squared_lengths=100**2 + 512**2 + 700**2 + 2000**2, tiles=9
    )
    assert totals.flops_vision == flops.vision + flops.connector > 0
    assert totals.flops_language == pytest.approx(flops.language_linear + flops.language_attention)


def test_buckets_end_with_the_length():
    assert buckets(64) == buckets(512) == [512]
    assert buckets(2000) == [512, 1024, 2000]
    assert len(buckets(131072)) == 9

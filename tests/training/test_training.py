"""Run configuration, schedule, loss, metrics and the command line of training."""

import importlib.util
import json
import math
from dataclasses import asdict

import pytest
import torch
import yaml

from megatron_eagle.config import save_yaml, to_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.language import Targets
from megatron_eagle.training.loss import megatron_loss, weighted_loss
from megatron_eagle.training.monitoring.metrics import StepMetrics, plot_loss_curve, read_metrics
from megatron_eagle.training.monitoring.run_log import LoggingConfig, RunLog
from megatron_eagle.training.optimizer import OptimizerConfig, build_scheduler
from megatron_eagle.training.run_config import RunConfig, load_run_config
from tests.parallel.harness import launch
from tests.paths import REPO
from tests.training.synthetic_data import write_manifest

MINIMAL = {
    "model": {"preset": "tiny"},
    "training": {"train_iterations": 100, "global_batch_size": 4},
    "checkpoint": {"path": "nowhere/checkpoint"},
}


@pytest.fixture
def config_file(tmp_path):
    write_manifest(tmp_path / "data")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "data": {"path": str(tmp_path / "data"), "length": 64}}))
    return file


def test_a_run_is_read_with_presets_overrides_and_defaults(config_file):
    overrides = ["optimizer.lr=1e-3", "model.text.num_hidden_layers=8", "parallel.context_parallel_size=2"]
    config = load_run_config(config_file, overrides, world_size=2)
    assert isinstance(config, RunConfig)
    assert config.optimizer.lr == 1e-3 and config.optimizer.weight_decay == 0.05
    assert config.model.text.num_hidden_layers == 8 and config.model.text.hidden_size == 64
    assert config.training.last_iteration == 100
    assert (config.model.text.vocab_size, config.model.image_token_index) == (504, 7), "the data's"


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["optimiser.lr=1"], 1, "unknown setting 'optimiser'; did you mean 'optimizer'?"),
        (["training.train_iteration=1"], 1, "did you mean 'training.train_iterations'?"),
        (["model.preset=tinny"], 1, "model.preset 'tinny' does not exist"),
        (["model="], 1, "model: missing"),
        (["model.text.hiden_size=2"], 1, "did you mean 'model.text.hidden_size'?"),
        (["training.precision=fp16"], 1, "'fp16' is not one of 'bf16', 'fp32'"),
        (["training.train_iterations=0"], 1, "training.train_iterations is 0: must lie between 1 and"),
        (
            ["training.stop_at_iteration=101"],
            1,
            "stop_at_iteration is 101: must be at most train_iterations 100",
        ),
        (["optimizer.min_lr=1"], 1, "optimizer.min_lr is 1: must be at most lr 2e-05"),
        (["optimizer.lr_warmup_iterations=100"], 1, "must be below training.train_iterations 100"),
        (["checkpoint.save_interval=0"], 1, "checkpoint.save_interval is 0: must lie between 1 and"),
        (["checkpoint.load=absent"], 1, "absent: no such folder; expected a checkpoint"),
        ([], 3, "global_batch_size is 4: must be a multiple of the data parallel size 3; nearest: 3 or 6"),
        ([], 8, "global_batch_size is 4: must be a multiple of the data parallel size 8; nearest: 8"),
        (["parallel.tensor_model_parallel_size=2"], 3, "3 processes cannot hold tensor 2"),
        (["parallel.tensor_model_parallel_size=4"], 4, "KV heads .*: choose 1 or 2"),
        (["parallel.pipeline_model_parallel_size=3"], 3, "4 language layers cannot be cut into 3"),
        (["parallel.context_parallel_size=3"], 3, "data.length 64 must be a multiple of 3"),
        (["data.path=absent"], 1, "absent is no token store"),
        (["data.length=96"], 1, "data.length is 96: .*data was prepared for 64"),
        (["model.vision.image_size=128"], 1, "its tile size is 64 and the model's 128; prepare it again"),
        (["model.text.vocab_size=8"], 1, "tokenizer has 504 tokens and model.text.vocab_size is 8"),
        (
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "training.global_batch_size=3",
            ],
            2,
            "global_batch_size is 3: with virtual pipeline stages .* a multiple of 2 microbatches .* 2 or 4",
        ),
    ],
)
def test_impossible_runs_are_refused(config_file, overrides, world_size, message):
    with pytest.raises(UserError, match=message) as caught:
        load_run_config(config_file, overrides, world_size=world_size)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused(config_file, tmp_path):
    """By its run.yaml, before anything is loaded. Without a model section a run takes the checkpoint's."""
    folder = tmp_path / "other" / "iter_0000005"
    folder.mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt", "state.json"):
        (folder / name).touch()
    model = to_dict(load_run_config(config_file, ["model.text.hidden_size=128"]).model)
    save_yaml({"model": model}, folder / "run.yaml")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("5\n")

    for setting in (f"checkpoint.path={folder.parent}", f"checkpoint.load={folder.parent}"):
        with pytest.raises(
            UserError, match=r"another model: model\.text\.hidden_size is 128 there and 64 here"
        ):
            load_run_config(config_file, [setting])
    config = load_run_config(config_file, ["model=", f"checkpoint.load={folder.parent}"])
    assert config.model.text.hidden_size == 128


def test_world_size_is_torchruns(config_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="data parallel size 3"):
        load_run_config(config_file)


class FakeOptimizer:
    def __init__(self):
        self.param_groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def learning_rates(**settings) -> list[float]:
    optimizer = FakeOptimizer()
    scheduler = build_scheduler(OptimizerConfig(lr=1.0, min_lr=0.1, **settings), optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_schedules():
    cosine = learning_rates(lr_warmup_fraction=0.1)
    assert cosine[:3] == pytest.approx([0.0, 0.1, 0.2]) and cosine[10] == 1.0 and cosine[100] == 0.1
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    constant = learning_rates(lr_decay_style="constant", lr_warmup_iterations=4)
    assert constant[2] == 0.5 and set(constant[4:]) == {1.0}
    wsd = learning_rates(lr_decay_style="wsd", lr_wsd_decay_fraction=0.2, lr_warmup_fraction=0.0)
    assert set(wsd[:81]) == {1.0} and wsd[90] == pytest.approx(0.55) and wsd[100] == pytest.approx(0.1)


def decayed_parameters() -> tuple[list[str], list[str]]:
    """On one rank: names of the parameters with and without weight decay."""
    from megatron_eagle.model.eagle import build_model
    from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
    from megatron_eagle.training.optimizer import build_optimizer, wrap_models
    from tests.parallel.cases import tiny_model

    with model_parallel(ParallelConfig()) as mesh:
        wrapped = wrap_models(build_model(tiny_model(), mesh, torch.device("cpu")))
        optimizer = build_optimizer(OptimizerConfig(), wrapped).chained_optimizers[0]
        names = {parameter: name for name, parameter in wrapped[0].module.named_parameters()}
        decayed, kept = [], []
        for parameter, (group, _) in optimizer.model_param_group_index_map.items():
            multiplier = optimizer.optimizer.param_groups[group]["wd_mult"]
            (decayed if multiplier else kept).append(names[parameter])
        return decayed, kept


def test_weight_decay_leaves_out_vectors():
    decayed, kept = launch(decayed_parameters, 1)[0]
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert all(name.endswith("bias") or "norm" in name for name in kept)
    assert len(decayed) == 30 and len(kept) == 36


def test_loss_is_a_plain_weighted_sum():
    losses = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 0.25])
    loss, count, (reported, by_group) = megatron_loss(
        losses, Targets(torch.zeros(3), weights, torch.tensor([2, 1, 0])), 4
    )
    assert loss.item() == reported.item() == 1.5
    assert by_group.tolist() == [1.0, 0.0, 0.5, 0.0] and by_group.dtype == torch.float64
    assert count.dtype == torch.int and not (reported.requires_grad or by_group.requires_grad)
    weighted_loss(losses, weights).backward()
    assert torch.equal(losses.grad[0], weights)


def test_metrics_files(tmp_path):
    logging = LoggingConfig(progress=False)
    with RunLog(logging, tmp_path, active=True, iteration=0, last_iteration=3) as log:
        for i in (1, 2, 3):
            log.step(StepMetrics(i, 3.0 / i, 1.0, 1e-3, 100, 0.5, 0.1))
    assert [m.loss for m in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 1.5, 1.0]
    assert list((tmp_path / "tensorboard").iterdir())
    with RunLog(logging, tmp_path, active=True, iteration=1, last_iteration=3):
        pass
    assert [m.iteration for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with RunLog(logging, tmp_path / "rank1", active=False, iteration=0, last_iteration=3) as log:
        log.step(StepMetrics(1, 1.0, 1.0, 1e-3, 100, 0.5, 0.1))
    assert not (tmp_path / "rank1").exists()


def test_loss_curve(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="no finished training step to draw"):
        plot_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    step = StepMetrics(1, loss=2.0, grad_norm=1.0, lr=0.1, tokens=8, seconds=1.0, tflops=0.1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(asdict(step)) + "\n")
    plot_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def train_main():
    spec = importlib.util.spec_from_file_location("train_tool", REPO / "tools" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_command_line_refuses_before_any_process_group(config_file, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "run", "--config", str(config_file), "data.lenght=64"])
    with pytest.raises(UserError, match=r"did you mean 'data.length'\?"):
        train_main()()
    monkeypatch.setenv("RANK", "1")
    assert train_main()() == 2, "only rank 0 prints, every rank fails"
    assert not torch.distributed.is_initialized()

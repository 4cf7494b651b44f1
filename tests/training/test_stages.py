"""Stages from one file: what each becomes, the hand-over between them, the published example."""

import gc
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from megatron_eagle.checkpoint import load_checkpoint, read_model_config, read_train_state
from megatron_eagle.config import load_yaml
from megatron_eagle.data.loading.loader import DataConfig
from megatron_eagle.data.store.manifest import DataManifest
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.presets import preset
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.loss import weighted_loss
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.schedule import build_batch, plan_batch
from megatron_eagle.training.stages import load_stages, train_stages
from megatron_eagle.training.train import train
from tests.parallel.harness import launch
from tests.paths import REPO
from tests.training.synthetic_data import LENGTH, SyntheticLoader, write_manifest

PROGRESSIVE = REPO / "examples" / "eagle2.5-8b" / "progressive.yaml"


@pytest.fixture
def file(tmp_path):
    """Two stages on data of their own: the connector under tensor parallelism, then all under context
    parallelism, with other activations kept."""
    for data in ("first", "second"):
        write_manifest(tmp_path / data)
    sections = {
        "model": {"preset": "tiny"},
        "training": {"global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 5e-3, "lr_warmup_fraction": 0.0},
        "logging": {"progress": False, "tensorboard": False},
        "checkpoint": {"path": str(tmp_path / "run")},
        "stages": {
            "align": {
                "data": {"path": str(tmp_path / "first"), "length": LENGTH},
                "training": {"train_iterations": 3},
                "optimizer": {"trainable": ["connector"], "lr": 1e-2},
                "parallel": {"tensor_model_parallel_size": 2},
                "recompute": {"language": "full"},
            },
            "all": {
                "data": {"path": str(tmp_path / "second"), "length": LENGTH},
                "training": {"train_iterations": 4},
                "parallel": {"context_parallel_size": 2},
                "recompute": {"language": "offload", "offload_keep_last": 1, "vision": "full"},
            },
        },
    }
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


class RecordingLoader(SyntheticLoader):
    """Writes down which samples this rank trained on, and of which data. The stages' data differ.

    Data are opened before a model is built: none may still be there from the stage before.
    """

    def __init__(self, config, **settings):
        assert not [thing for thing in gc.get_objects() if isinstance(thing, EagleModel)]
        super().__init__(config, **settings)
        self._offset = 1000 if Path(config.path).name == "second" else 0
        self._file = Path(config.path).parent / f"samples_{torch.distributed.get_rank()}.jsonl"

    def step(self, consumed_packs):
        batch = super().step(consumed_packs + self._offset)
        with open(self._file, "a") as file:
            file.write(json.dumps([row for pack in batch.microbatches for row in pack.sample_rows]) + "\n")
        return batch


def train_rank(file: str, overrides: list[str], stage: str | None) -> int:
    """On each rank: all stages, or one."""
    configs = load_stages(file, overrides, stage=stage, world_size=2)
    return train_stages(configs, partial(train, open_loader=RecordingLoader)).iteration


def evaluate_handed_over(checkpoint: str, data: str) -> float:
    """In one process: the loss of a checkpoint's weights on the first global batch of `second`."""
    eagle, device = read_model_config(checkpoint), Device("cpu")
    with device.context(), process_group(device), model_parallel(ParallelConfig()) as mesh, torch.no_grad():
        (model,) = models = build_model(eagle, mesh, device.torch_device)
        load_checkpoint(checkpoint, models=models)
        loader = SyntheticLoader(
            DataConfig(data, LENGTH),
            global_batch_size=4,
            data_parallel_rank=0,
            data_parallel_size=1,
            plan=partial(plan_batch, eagle, mesh, False),
            device=device.torch_device,
        )
        total = 0.0
        for batch in loader.step(1000).microbatches:
            inputs = build_batch(device.torch_device, batch)
            total += weighted_loss(model(inputs), inputs.targets.loss_weights).item()
        return total


def samples(folder: Path) -> list[list[int]]:
    """Per step, what rank 0 and (where it has data of its own) rank 1 trained on."""
    return [json.loads(line) for line in (folder / "samples_0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "layout",
    [
        {"context_parallel_size": 2},
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["TP2 to CP2", "TP2 to PP2"],
)
def test_hand_over_across_layouts(file, tmp_path, layout):
    """The first stage stops and resumes half-way; the second follows by itself, under another layout and
    with another policy for activations."""
    values = load_yaml(file)
    values["stages"]["all"]["parallel"] = layout
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    assert launch(train_rank, 2, str(file), ["training.stop_at_iteration=2"], "align") == [2, 2]
    assert launch(train_rank, 2, str(file), [], None) == [4, 4]
    run = tmp_path / "run"
    assert [read_train_state(run / name).iteration for name in ("align", "all")] == [3, 4]

    metrics = read_metrics(run / "all" / "logs" / "metrics.jsonl")
    assert metrics[0].loss == pytest.approx(
        evaluate_handed_over(str(run / "align"), str(tmp_path / "second")), rel=1e-5
    ), "the second stage starts from the first one's weights, to the loss"
    assert [m.iteration for m in metrics] == [1, 2, 3, 4] and metrics[0].lr == 5e-3, "a fresh schedule"

    steps = samples(tmp_path)
    assert steps[:3] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], "resumed where it stood"
    second = [row for step in steps[3:] for row in step]
    assert second == list(range(1000, 1016)), "its own data from the start, no sample twice"

    assert launch(train_rank, 2, str(file), [], None) == [4, 4], "nothing is left to do"
    assert len(samples(tmp_path)) == 7


def test_a_stage_is_a_run_of_its_own(file, tmp_path):
    overrides = ["checkpoint.path=elsewhere", "optimizer.weight_decay=0.1", "logging.path=logs"]
    align, everything = load_stages(file, overrides, world_size=2)
    assert align.optimizer.trainable == ("connector",) and align.optimizer.lr == 1e-2
    assert everything.optimizer.lr == 5e-3 and len(everything.optimizer.trainable) == 3
    assert [c.optimizer.weight_decay for c in (align, everything)] == [0.1, 0.1]
    assert (align.checkpoint.path, align.checkpoint.load) == ("elsewhere/align", None)
    assert (everything.checkpoint.path, everything.checkpoint.load) == ("elsewhere/all", "elsewhere/align")
    assert everything.logging.path == "logs/all"
    (alone,) = load_stages(file, overrides, stage="align", world_size=2)
    assert alone == align


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        ({}, "alll", r"there is no stage 'alll', only align, all; did you mean 'all'\?"),
        (
            {},
            "all",
            "the weights of align, whose checkpoint .* is absent .*: run --stage align first",
        ),
        ({"stages": None}, None, "training.train_iterations: missing"),
        ({"stages": []}, None, "stages must map names to settings"),
        ({"stages": {"../a": {}}}, None, "stage '../a' names a folder"),
        ({"stages": {"a": 3}}, None, "stages.a: expected the settings"),
        ({"stages": {"a": {"model": {}}}}, None, "stages.a.model: set the one model"),
        ({"stages": {"a": {"checkpoint": {"path": "x"}}}}, None, "set checkpoint.path at the top level"),
    ],
)
def test_impossible_stages_are_refused(file, change, stage, message):
    values = {**load_yaml(file), **change}
    values = {key: value for key, value in values.items() if value is not None}
    values.setdefault("data", {"path": "absent", "length": LENGTH})
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match=message) as caught:
        load_stages(file, stage=stage, world_size=2)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_last_stage_is_found_before_the_first_starts(file):
    values = load_yaml(file)
    values["stages"]["all"]["parallel"]["context_parallel_size"] = 3
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match="context 3"):
        load_stages(file, world_size=2)


def test_a_stage_needs_what_the_one_before_saves(file):
    with pytest.raises(
        UserError, match="stage all starts from what align saves, and checkpoint.save is false"
    ):
        load_stages(file, ["checkpoint.save=false"], world_size=2)
    (alone,) = load_stages(file, ["checkpoint.save=false"], stage="align", world_size=2)
    assert not alone.checkpoint.save


def test_the_published_stages_load(tmp_path, monkeypatch):
    """On 64 processes, with nothing of their data but manifests."""
    monkeypatch.chdir(tmp_path)
    values, eagle = load_yaml(PROGRESSIVE), preset("eagle2.5-8b")
    lengths: dict[str, list[int]] = {}
    for section in values["stages"].values():
        lengths.setdefault(section["data"]["path"], []).append(section["data"]["length"])
    for path, prepared in lengths.items():
        Path(path).mkdir(parents=True)
        DataManifest(
            fingerprint="synthetic",
            template="train",
            tile_size=eagle.vision.image_size,
            patch_size=eagle.vision.patch_size,
            tokens_per_tile=eagle.tokens_per_tile,
            vocab_size=eagle.text.vocab_size or 151674,
            image_token_id=eagle.image_token_index or 151667,
            pad_token_id=0,
            lengths=prepared,
            sources=[],
            sampling={"max_tiles": 12},
            max_pixels=0,
        ).save(Path(path))
    configs = load_stages(PROGRESSIVE, ["model.preset=eagle2.5-8b", "checkpoint.load="], world_size=64)
    assert [c.data.length for c in configs] == [32768, 32768, 32768, 65536, 131072]
    assert [c.training.global_batch_size * c.data.length for c in configs] == 5 * [2**21], "the same tokens"
    assert [c.recompute.language for c in configs] == [*(3 * ["none"]), "offload", "offload"]
    for config in configs:
        sizes = config.parallel
        assert sizes.tensor_model_parallel_size * sizes.context_parallel_size == 8, "one node"
        assert config.resilience == configs[0].resilience and config.checkpoint.save_interval == 250
    assert configs[0].optimizer.trainable == ("connector",)
    for config in configs[1:]:
        assert set(config.optimizer.trainable) == {"vision", "connector", "language"}
        assert (config.optimizer.lr, config.optimizer.adam_beta2) == (2e-5, 0.999)

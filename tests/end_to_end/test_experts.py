"""Experts on real packs: exports and continuations of any layout, frozen parts, looks back, adapters."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_eagle.checkpoint import checkpoint_folder, load_checkpoint, read_model_config, save_checkpoint
from megatron_eagle.config import load_yaml, save_yaml, to_dict
from megatron_eagle.convert.lora import WEIGHTS, export_adapter
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.text import ExpertsConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.monitoring.metrics import read_steps
from megatron_eagle.training.replay.replay import measure_losses, prepare
from tests.convert.hf_folder import read_weights
from tests.convert.use_export import load_model
from tests.parallel.harness import launch
from tests.parallel.real_runs import train_cells, write_mixture, write_run
from tests.parallel.store_cells import model_for

pytestmark = pytest.mark.slow

EP2 = {"expert_model_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
WHOLE = {"expert_tensor_parallel_size": 1}
CP2, PP2 = {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
EP2_TP2 = {**EP2, **TP2_SP, **WHOLE}
EXPERTS = ExpertsConfig(8, 2, 48, norm_topk_prob=True, router_aux_loss_coef=0.1)


def write(folder: Path, **sections: dict) -> Path:
    """A run's file of a model with experts, on the store in `folder/data`, which is made if need be."""
    store = folder / "data" / "store"
    if not store.exists():
        store = write_mixture(folder / "data")
    eagle = model_for(str(store))
    text = replace(eagle.text, model_type="qwen3_moe", head_dim=24, experts=EXPERTS)
    file = folder / "run.yaml"
    model = to_dict(replace(eagle, text=text))
    write_run(file, store, model=model, training={"train_iterations": 3}, **sections)
    return file


def train(file: Path, world_size: int, parallel: dict, *more: str) -> None:
    overrides = [f"parallel={json.dumps(parallel)}", *more]
    launch(train_cells, world_size, str(file), world_size, [(overrides, [])])


def losses(run: Path) -> list[float]:
    return [step.loss for step in read_steps(run / "logs" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`run`: three steps, each saved, of two ranks with whole experts of their own; and `run.yaml`."""
    folder = tmp_path_factory.mktemp("experts")
    train(write(folder, checkpoint={"save_interval": 1}), 2, EP2_TP2)
    return folder


def exported(checkpoint: Path, hf: Path) -> dict[str, torch.Tensor]:
    export_hf(checkpoint, hf)
    return read_weights(hf)


def save_again(source: str, target: str, parallel: dict) -> None:
    """On each rank: the weights of a checkpoint, as another layout saves them."""
    folder = checkpoint_folder(source)
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build_model(read_model_config(source), mesh, torch.device("cpu"))
        load_checkpoint(source, models=models)
        iteration = int(folder.name.removeprefix("iter_"))
        save_checkpoint(target, models=models, run_config=load_yaml(folder / "run.yaml"), iteration=iteration)


def test_exports_of_every_layout_have_the_same_bytes(made, tmp_path):
    export_hf(made / "run", tmp_path / "hf")
    expected = {file.name: file.read_bytes() for file in (tmp_path / "hf").glob("*.safetensors")}
    for number, (world_size, parallel) in enumerate(
        [(1, {}), (2, EP2), (2, TP2_SP), (4, {"expert_model_parallel_size": 4}), (4, PP2 | EP2)]
    ):
        again = tmp_path / str(number)
        launch(save_again, world_size, str(made / "run"), str(again), parallel)
        shutil.copytree(made / "run" / "hf", again / "hf")
        out = tmp_path / f"hf-{number}"
        export_hf(again, out)
        assert {file.name: file.read_bytes() for file in out.glob("*.safetensors")} == expected, parallel
        assert (out / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    model = load_model(tmp_path / "hf")
    text = model.config.text_config
    assert (text.model_type, text.num_experts, text.num_experts_per_tok) == ("qwen3_moe", 8, 2)


def test_a_run_goes_on_with_experts_divided_otherwise(made, tmp_path):
    """From the second of its three iterations; the third has the loss that it had."""
    for number, (world_size, parallel) in enumerate([(1, {}), (4, {"expert_model_parallel_size": 4})]):
        run = shutil.copytree(made / "run", tmp_path / str(number))
        shutil.rmtree(run / "iter_0000003")
        (run / "latest_checkpointed_iteration.txt").write_text("2")
        train(made / "run.yaml", world_size, parallel, f"checkpoint.path={run}")
        assert losses(run) == pytest.approx(losses(made / "run"), rel=1e-5)


def test_a_stage_of_the_connector_alone_trains_as_in_one_process(made, tmp_path):
    """All experts are frozen, and stay bit for bit; no router has an auxiliary loss."""
    base, runs = exported(made / "run", tmp_path / "base"), []
    for world_size, parallel in ((1, {}), (2, EP2), (2, EP2_TP2), (4, EP2 | PP2)):
        run = tmp_path / f"run-{len(runs)}"
        where = [
            f"checkpoint.load={made / 'run'}",
            f"checkpoint.path={run}",
            "optimizer.trainable=[connector]",
        ]
        train(made / "run.yaml", world_size, parallel, *where)
        runs.append(run)
    expected = losses(runs[0])
    for run in runs[1:]:
        assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert {step.aux_loss for step in read_steps(runs[-1] / "logs" / "metrics.jsonl")} == {None}
    after = exported(runs[-1], tmp_path / "hf")
    moved = {name for name in base if not torch.equal(base[name], after[name])}
    assert moved and all(name.startswith("mlp1.") for name in moved)


def test_routers_that_are_frozen_stay(made, tmp_path):
    """And everything else of the language model moves, in every layout to the same losses."""
    base, runs = exported(made / "run", tmp_path / "base"), []
    for world_size, parallel in ((1, {}), (2, EP2_TP2)):
        run = tmp_path / f"run-{len(runs)}"
        where = [f"checkpoint.load={made / 'run'}", f"checkpoint.path={run}", "optimizer.freeze_router=true"]
        train(made / "run.yaml", world_size, parallel, *where)
        runs.append(run)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    after = exported(runs[1], tmp_path / "hf")
    moved = {name for name in base if not torch.equal(base[name], after[name])}
    gates = {f"language_model.model.layers.{layer}.mlp.gate.weight" for layer in range(4)}
    assert {name for name in base.keys() - moved if name.endswith("mlp.gate.weight")} == gates
    assert sum(".experts." in name for name in moved) == 4 * 8 * 3


def ask(run: str, overrides: list[str]) -> dict:
    """On each rank: the second step again."""
    world_size = torch.distributed.get_world_size()
    replay = measure_losses(prepare(run, 2, checkpoint=run, overrides=overrides, world_size=world_size))
    return {"off": replay.off, "samples": {s.number: (s.loss, s.grad_norm) for s in replay.samples}}


def test_a_step_is_looked_back_at(made):
    """In one process, and on ranks of other layouts: losses that add up, and norms of each sample."""
    [one] = launch(ask, 1, str(made / "run"), [])
    assert one["off"] <= 1e-6 and len(one["samples"]) > 4
    for world_size, parallel in ((2, EP2_TP2), (2, TP2_SP), (2, CP2 | EP2), (2, PP2), (2, EP2)):
        found = launch(ask, world_size, str(made / "run"), [f"parallel={json.dumps(parallel)}"])[0]
        assert found["off"] <= 1e-6, parallel
        for number, values in one["samples"].items():
            assert found["samples"][number] == pytest.approx(values, rel=1e-5), parallel


def test_a_run_whose_dispatcher_is_of_expert_parallelism_is_looked_back_at(made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run")
    for file in run.glob("iter_*/run.yaml"):
        values = load_yaml(file)
        save_yaml({**values, "layers": {"moe_token_dispatcher_type": "flex", "loss": "fused"}}, file)
    for world_size, parallel in ((1, []), (2, [f"parallel={json.dumps(EP2)}"])):
        asked = prepare(run, 2, checkpoint=run, overrides=parallel, world_size=world_size).weights.config
        assert (asked.layers.moe_token_dispatcher_type, asked.layers.loss) == ("alltoall", "fused")


def test_adapters_on_attention(made, tmp_path):
    """The same losses whatever ranks divide the experts, which stay bit for bit; out again merged, and as
    peft's folder."""
    runs = []
    for world_size, parallel in ((1, {}), (2, EP2), (2, EP2_TP2), (4, PP2 | EP2)):
        run = tmp_path / f"run-{len(runs)}"
        where = [
            f"checkpoint.load={made / 'run'}",
            f"checkpoint.path={run}",
            "optimizer.trainable=[language]",
        ]
        lora = "lora={rank: 2, target_modules: [q_proj, k_proj, v_proj, o_proj]}"
        train(made / "run.yaml", world_size, parallel, *where, lora)
        runs.append(run)
    expected = losses(runs[0])
    for run in runs[1:]:
        assert losses(run) == pytest.approx(expected, rel=1e-5)
    base, merged = exported(made / "run", tmp_path / "base"), exported(runs[-1], tmp_path / "merged")
    moved = {name.removesuffix(".weight") for name in base if not torch.equal(base[name], merged[name])}
    places = [f"language_model.model.layers.{n}.self_attn.{x}_proj" for n in range(4) for x in "qkvo"]
    assert moved == set(places)
    export_adapter(runs[-1], tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).is_file()

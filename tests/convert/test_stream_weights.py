"""Weights out of a model that trains, in any layout: bit for bit those of an export, one tensor at a time."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_eagle.checkpoint import load_checkpoint, read_lora_config, read_model_config, save_checkpoint
from megatron_eagle.convert import stream_weights
from megatron_eagle.convert.mapping import PASSED_THROUGH
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.lora import LoraConfig, add_lora
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    gather_parameters,
    wrap_models,
)
from tests.convert.hf_folder import read_weights
from tests.convert.test_lora import fill_b
from tests.parallel.harness import launch
from tests.parallel.memory_run import held_during

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "TP2xPP2": (4, {**TP2, **PP2}),
    "CP2xTP2": (4, {**TP2, "context_parallel_size": 2}),
    "PP2": (2, PP2),
    "DP2": (2, {}),
}
NORM = "language_model.model.norm.weight"
PATCHES = "vision_model.vision_model.embeddings.patch_embedding.weight"


def streamed(source: str, parallel: dict) -> dict:
    """On each rank: what the model of the checkpoint `source` streams, and what of it by name."""
    config, lora = read_model_config(source), read_lora_config(source)
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build_model(config, mesh, torch.device("cpu"))
        if lora is not None:
            add_lora(models, lora, seed=2)
        load_checkpoint(source, models=models)
        result = {name: tensor.clone() for name, tensor in stream_weights(models, lora=lora)}
        some = dict(stream_weights(models, {NORM, PATCHES}, lora=lora))
        assert list(some) == [PATCHES, NORM] and all(some[name].equal(result[name]) for name in some)
        with torch.no_grad():  # training goes on
            for model in models:
                for parameter in model.parameters():
                    parameter.add_(1)
        ((_, now),) = stream_weights(models, {PATCHES}, lora=lora)
        torch.testing.assert_close(now, result[PATCHES] + 1)
    return result


def check(ranks: list[dict], exported: Path) -> None:
    head = {name for name, _ in PASSED_THROUGH}
    wanted = {name: tensor for name, tensor in read_weights(exported).items() if name not in head}
    for found in ranks:
        assert found.keys() == wanted.keys()
        odd = [name for name in wanted if not found[name].equal(wanted[name])]
        assert not odd, odd


# One process's copy of another layout's is what the slow ones add.
@pytest.mark.parametrize(
    "layout",
    [name if name == "TP2xPP2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_every_layout_streams_what_is_exported(layout, checkpoint, exported):
    world_size, parallel = LAYOUTS[layout]
    check(launch(streamed, world_size, str(checkpoint), parallel), exported)


def adapted(source: str, target: str) -> dict:
    """On each rank: a model with adapters is saved and streamed; without saying so it is refused."""
    config, lora = read_model_config(source), LoraConfig(rank=3, alpha=5.0)
    with model_parallel(ParallelConfig(**TP2)) as mesh:
        models = build_model(config, mesh, torch.device("cpu"))
        load_checkpoint(source, models=models)
        add_lora(models, lora, seed=1)
        fill_b(models[0], mesh.tp.rank)
        save_checkpoint(target, models=models, run_config={"model": config, "lora": lora}, iteration=3)
        with pytest.raises(UserError, match="the model has adapters: say lora="):
            next(stream_weights(models))
        with pytest.raises(UserError, match=r"has no tensor lm_head.weight \(1\)"):
            next(stream_weights(models, ["lm_head.weight"]))
        return {name: tensor.clone() for name, tensor in stream_weights(models, lora=lora)}


@pytest.mark.slow
def test_adapters_are_merged_as_an_export_merges_them(checkpoint, tmp_path):
    ranks = launch(adapted, 2, str(checkpoint), str(tmp_path / "c"))
    shutil.copytree(checkpoint / "hf", tmp_path / "c" / "hf")
    export_hf(tmp_path / "c", tmp_path / "out")
    check(ranks, tmp_path / "out")


def trained(source: str, target: str) -> dict:
    """On each rank: a step after which parameters are still to be gathered; what is stale without that."""
    parallel = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    config = read_model_config(source)
    with model_parallel(parallel) as mesh:
        models = build_model(config, mesh, torch.device("cpu"))
        load_checkpoint(source, models=models)
        wrapped = wrap_models(models)
        optimizer = build_optimizer(OptimizerConfig(lr=1e-2), wrapped)
        for parameter in models[0].parameters():
            parameter.main_grad.fill_(0.1)
        optimizer.step()
        stale = {name: tensor.clone() for name, tensor in stream_weights(models)}
        result = {name: tensor.clone() for name, tensor in stream_weights(wrapped)}
        assert any(not stale[name].equal(result[name]) for name in result)  # the control
        gather_parameters(wrapped)
        save_checkpoint(target, models=wrapped, model_config=config, iteration=1)
    return result


def test_parameters_on_their_way_are_waited_for(checkpoint, tmp_path):
    ranks = launch(trained, 2, str(checkpoint), str(tmp_path / "c"))
    shutil.copytree(checkpoint / "hf", tmp_path / "c" / "hf")
    export_hf(tmp_path / "c", tmp_path / "out")
    check(ranks, tmp_path / "out")


def held(source: str) -> tuple[int, int]:
    """On each rank: bytes held at the peak of a stream beyond those before it, and the largest tensor's."""
    config = read_model_config(source)
    with model_parallel(ParallelConfig(**TP2)) as mesh:
        models = build_model(config, mesh, torch.device("cpu"))
        load_checkpoint(source, models=models)
        profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        with profiler, record_function("stream"):
            for _ in stream_weights(models):
                pass
        largest = max(tensor.nbytes for _, tensor in stream_weights(models))
        bytes_held = held_during(profiler, "stream")
        return bytes_held["peak"] - bytes_held["before"], largest


@pytest.mark.slow
def test_one_tensor_at_a_time_is_in_memory(checkpoint, exported):
    whole = sum(tensor.nbytes for tensor in read_weights(exported).values())
    for peak, largest in launch(held, 2, str(checkpoint)):
        assert largest <= peak <= 2.5 * largest < whole / 2, (peak, largest)

"""A few real optimizer steps of the tiny model in any layout, between a load and a save."""

import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eagle.checkpoint import (
    CheckpointConfig,
    CheckpointSaver,
    TrainState,
    files,
    folder,
    load_checkpoint,
    save_checkpoint,
    saver,
    saving,
)
from megatron_eagle.config import to_dict
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import global_name, initialize_parameters
from megatron_eagle.model.parts import freeze
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, build_scheduler, wrap_models
from tests.checkpoint.contents import different_from_megatron
from tests.full_disk import full_disk
from tests.parallel.cases import global_batch, run_schedule, tiny_model
from tests.parallel.harness import launch

OPTIMIZER = {"lr": 5e-3, "lr_warmup_fraction": 0.0, "weight_decay": 0.1}
CPU = torch.device("cpu")
EAGLE = tiny_model()


def run_steps(parallel: dict, eagle: EagleConfig, options: dict) -> dict:
    """On each rank: `_run` with `options`."""
    return _run(parallel, eagle, **options)


def steps(world_size: int, parallel: dict, *, eagle: EagleConfig = EAGLE, **options) -> list[dict]:
    """`run_steps` on forked ranks, or right here if one will do."""
    if world_size > 1:
        return launch(run_steps, world_size, parallel, eagle, options)
    device = Device("cpu")
    with device.context(), process_group(device):
        return [run_steps(parallel, eagle, options)]


def save_fresh(eagle: EagleConfig, root: str) -> None:
    """In one process: a model without optimizer, as a converter saves it."""
    with model_parallel(ParallelConfig()) as mesh:
        models = build_model(eagle, mesh, CPU)
        initialize_parameters(models, seed=1)
        save_checkpoint(root, models=models, model_config=eagle)


def save_killed(eagle: EagleConfig, root: str, point: str, async_save: bool = False) -> None:
    """Continue from `root` to iteration 3 and die at `point` of the save; of several ranks, only the last."""

    def die(*_, **__):
        os._exit(9)

    if point == "before the copy":
        files.HostCopy.fill = die
    elif point == "middle of a file":
        files.torch.save = die_at(20, torch.save)
    elif point == "one rank":
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            files.torch.save = die
    elif point == "tensors":
        saving.gather_to_first = die  # tensors written, nothing else yet
    elif point in ("index", "run.yaml", "manifest", "rename"):
        name = {"index": "write_checkpoint_index", "run.yaml": "save_yaml", "manifest": "write_manifest"}
        setattr(saving, name.get(point, "publish_folder"), die)
    elif point == "common.pt":
        saving.save_config = die  # written just before
    elif point == "state.json":
        saving.json = SimpleNamespace(dumps=die)
    elif point == "tracker":
        Path.replace = die  # the folder has its name, the tracker still points to the previous one
    elif point == "retention":
        folder.shutil.rmtree = die_at(2, shutil.rmtree)  # the first empties the place of the new one
    parallel = {"tensor_model_parallel_size": torch.distributed.get_world_size()}  # so that every rank writes
    _run(parallel, eagle, until=3, load=root, save=root, keep_last=1, async_save=async_save)


def die_at(number: int, function):
    """`function`, whose call of this number ends the process."""
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == number:
            os._exit(9)
        return function(*args, **kwargs)

    return counted


def save_on_full_disk(eagle: EagleConfig, root: str, limit: int) -> str:
    """Continue from `root` to iteration 3 where no file may grow beyond `limit` bytes -> the error."""
    write = saver.write_snapshot

    def limited(*args):
        with full_disk(limit):
            return write(*args)

    saver.write_snapshot = limited
    try:
        _run({}, eagle, until=3, load=root, save=root)
    except AgreedError as error:
        return str(error)
    return ""


def build(
    eagle: EagleConfig,
    mesh: Mesh,
    seed: int,
    dtype: torch.dtype = torch.float32,
    optimizer_settings: dict | None = None,
    weights: str | None = None,
) -> tuple[list, list, MegatronOptimizer, OptimizerParamScheduler]:
    """Model chunks, the same wrapped, optimizer, schedule; with the weights of the checkpoint `weights`."""
    models = build_model(eagle, mesh, CPU, dtype)
    initialize_parameters(models, seed)
    if weights is not None:
        load_checkpoint(weights, models=models)
    config = OptimizerConfig(**OPTIMIZER | (optimizer_settings or {}))
    freeze(models, config.trainable, config.first_new_token)
    wrapped = wrap_models(models)
    optimizer = build_optimizer(config, wrapped)
    return models, wrapped, optimizer, build_scheduler(config, optimizer, train_iterations=30)


def _run(
    parallel: dict,
    eagle: EagleConfig,
    *,
    until: int,
    load: str | None = None,
    save: str | None = None,
    keep_last: int | None = None,
    async_save: bool = False,
    save_loaded: str | None = None,
    against_megatron: bool = False,
    weights_only: bool = False,
    dtype: torch.dtype = torch.float32,
    optimizer_settings: dict | None = None,
) -> dict:
    """Start fresh or from `load`, train up to iteration `until`, save.

    -> {"start": iteration and packs; "losses", "norms", "lr": one per step, equal on all ranks; "parameters"
    of this rank by chunk and name; with `against_megatron`, how `different_from_megatron` what was saved is}.
    `save_loaded`: what was loaded is saved there before the first step.
    """
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        weights = load if weights_only else None
        models, wrapped, optimizer, scheduler = build(
            eagle, mesh, 1 if load is None else 2, dtype, optimizer_settings, weights
        )
        state = TrainState()
        if load is not None and not weights_only:
            state = load_checkpoint(load, models=wrapped, optimizer=optimizer, scheduler=scheduler)
        result = {"losses": [], "norms": [], "lr": [], "start": (state.iteration, state.consumed_packs)}
        if save_loaded is not None:
            save_checkpoint(save_loaded, models=wrapped, optimizer=optimizer, model_config=eagle, iteration=1)
        for _ in range(state.iteration, until):
            result["lr"].append(optimizer.param_groups[0]["lr"])
            result["losses"].append(_forward_backward(eagle, mesh, wrapped))
            result["norms"].append(optimizer.step()[1])
            scheduler.step(1)
        if save is not None:
            config = CheckpointConfig(save, keep_last=keep_last, async_save=async_save)
            with CheckpointSaver(config, print) as saves:
                state = TrainState(until, 4 * until)
                run = {"model": to_dict(eagle)}
                saves.save(wrapped, optimizer, scheduler, run, state, must_succeed=not async_save)
        if against_megatron:
            result["different"] = different_from_megatron(save, wrapped, optimizer)
        result["parameters"] = {
            f"{chunk} {global_name(name, model)}": parameter.detach().clone()
            for chunk, model in enumerate(models)
            for name, parameter in model.named_parameters()
        }
        return result


def _forward_backward(eagle, mesh, wrapped) -> float:
    loss = torch.tensor(run_schedule(wrapped, eagle, mesh, global_batch(eagle)), dtype=torch.float64)
    torch.distributed.all_reduce(loss)
    return loss.item()

"""A few real optimizer steps of the tiny model in any layout, between a load and a save."""

import itertools
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import global_name, initialize_parameters
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.agreement import AgreedError
from megatron_eagle.training.checkpoint import (
    TrainState,
    files,
    folder,
    load_checkpoint,
    save_checkpoint,
    saving,
)
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, build_scheduler, wrap_models
from megatron_eagle.training.parts import freeze
from tests.parallel.cases import global_batch, run_schedule

OPTIMIZER = {"lr": 5e-3, "lr_warmup_fraction": 0.0, "weight_decay": 0.1}
CPU = torch.device("cpu")


def run_steps(parallel: dict, eagle: EagleConfig, options: dict) -> dict:
    """On each rank: `_run` with `options`."""
    return _run(parallel, eagle, **options)


def save_fresh(eagle: EagleConfig, root: str) -> None:
    """In one process: a model without optimizer, as a converter saves it."""
    with model_parallel(ParallelConfig()) as mesh:
        models = build_model(eagle, mesh, CPU)
        initialize_parameters(models, seed=1)
        save_checkpoint(root, models=models, model_config=eagle)


def save_killed(eagle: EagleConfig, root: str, point: str) -> None:
    """Continue from `root` to iteration 3 and die at `point` of the save; of several ranks, only the last."""

    def die(*_, **__):
        os._exit(9)

    if point == "middle of a file":
        files.torch.save = die_at(20, torch.save)
    elif point == "one rank":
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            files.torch.save = die
    elif point == "tensors":
        saving.gather_to_first = die  # tensors written, nothing else yet
    elif point in ("index", "run.yaml", "manifest", "rename"):
        name = {"index": "write_index", "run.yaml": "save_yaml", "manifest": "write_manifest"}
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
    _run(parallel, eagle, until=3, load=root, save=root, keep_last=1)


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
    write = saving.write_snapshot

    def limited(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    saving.write_snapshot = limited
    try:
        _run({}, eagle, until=3, load=root, save=root)
    except AgreedError as error:
        return str(error)
    return ""


def _run(
    parallel: dict,
    eagle: EagleConfig,
    *,
    until: int,
    load: str | None = None,
    save: str | None = None,
    keep_last: int | None = None,
    weights_only: bool = False,
    dtype: torch.dtype = torch.float32,
    optimizer_settings: dict | None = None,
) -> dict:
    """Start fresh or from `load`, train up to iteration `until`, save.

    -> {"start": iteration and packs; "losses", "norms", "lr": one per step, equal on all ranks; "parameters"
    of this rank by chunk and name}.
    """
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build_model(eagle, mesh, CPU, dtype)
        initialize_parameters(models, seed=1 if load is None else 2)
        if load is not None and weights_only:
            load_checkpoint(load, models=models)
        config = OptimizerConfig(**OPTIMIZER | (optimizer_settings or {}))
        freeze(models, config.trainable, config.first_new_token)
        wrapped = wrap_models(models)
        optimizer = build_optimizer(config, wrapped)
        scheduler = build_scheduler(config, optimizer, train_iterations=20)
        state = TrainState()
        if load is not None and not weights_only:
            state = load_checkpoint(load, models=wrapped, optimizer=optimizer, scheduler=scheduler)
        result = {"losses": [], "norms": [], "lr": [], "start": (state.iteration, state.consumed_packs)}
        for _ in range(state.iteration, until):
            result["lr"].append(optimizer.param_groups[0]["lr"])
            result["losses"].append(_forward_backward(eagle, mesh, wrapped))
            result["norms"].append(optimizer.step()[1])
            scheduler.step(1)
        if save is not None:
            save_checkpoint(
                save,
                models=wrapped,
                optimizer=optimizer,
                scheduler=scheduler,
                model_config=eagle,
                iteration=until,
                consumed_packs=4 * until,
                keep_last=keep_last,
            )
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

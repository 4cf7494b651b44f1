"""Stages from one file: what is common stands at the top level, what a stage changes under its name.

model: {preset: eagle2.5-8b}
checkpoint: {path: runs/eagle, load: checkpoints/start}   `load` starts the first stage
stages:                                                    in this order
  stage1: {data: {path: data/captions, length: 32768}, training: {train_iterations: 1000}, ...}
  stage2: {data: {path: data/mixed, length: 65536}, parallel: {context_parallel_size: 4}, ...}

A stage is a run of its own with its checkpoints in `checkpoint.path`/NAME. It starts from the weights of the
stage before it, under whatever layout, with a fresh optimizer and schedule, at the start of its own data.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint import TrainState, has_checkpoint, read_train_state
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.launcher import end_with_launcher
from megatron_eagle.training.run_config import RunConfig, complete_run_config
from megatron_eagle.training.stage_settings import NO_STAGE, stage_runs
from megatron_eagle.training.train import starting, train


def load_stages(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    stage: str | None = None,
    world_size: int | None = None,
) -> list[RunConfig]:
    """The runs that the file stands for: its one run, all its stages in turn, or the one named `stage`.

    Overrides hold for every stage. All runs are checked before the first starts, as by `load_run_config`.

    Raises:
        UserError: a run is not as it must be, a stage does not exist, or its predecessor has not finished.
    """
    runs = stage_runs(path, overrides, stage)
    if list(runs) == [NO_STAGE]:
        return [complete_run_config(runs[NO_STAGE], world_size=world_size)]
    configs: list[RunConfig] = []
    previous = None
    for name, run in runs.items():
        if stage is None or name == stage:
            starts = not has_checkpoint((run.get("checkpoint") or {}).get("path") or "")
            if previous is not None and not configs and starts:
                _check_finished(previous, name, runs[previous])
            before = configs[-1] if configs else None
            if before is not None and not before.checkpoint.save:
                raise UserError(
                    f"{path}: stage {name} starts from what {previous} saves, and checkpoint.save is false "
                    "there: set it to true, or run one stage with --stage"
                )
            configs.append(complete_run_config(run, world_size=world_size, before=before))
        previous = name
    return configs


def train_stages(
    configs: Sequence[RunConfig], train: Callable[[RunConfig], TrainState] = train
) -> TrainState:
    """Run (or resume) stages in turn; the finished ones at the front are passed over. Collective.

    A stage that is told to end early ends all.

    Args:
        train: what runs a stage.
    Returns:
        The state of the last stage that ran.
    Raises:
        UserError: as `train`.
    """
    while len(configs) > 1 and _finished(configs[0].checkpoint.path, configs[0].training.train_iterations):
        configs = configs[1:]
    device = detect_device()
    with end_with_launcher(), ExitStack() as opened:
        with starting(configs[0]):
            opened.enter_context(process_group(device))  # one for all stages: the rendezvous serves once
        for config in configs:
            state = train(config)
            gc.collect()  # wrapped models hold themselves in circles: their memory belongs to the next stage
            if state.iteration < config.training.train_iterations:
                break
    return state


def _check_finished(previous: str, name: str, run: dict[str, Any]) -> None:
    path = run["checkpoint"]["path"]
    last = (run.get("training") or {}).get("train_iterations")
    if last is None or not _finished(path, last):
        state = (
            f"stands at iteration {read_train_state(path).iteration}" if has_checkpoint(path) else "is absent"
        )
        raise UserError(
            f"stage {name} starts from the weights of {previous}, whose checkpoint {path} {state} "
            f"and should be at {last}: run --stage {previous} first"
        )


def _finished(path: str, last: int) -> bool:
    return has_checkpoint(path) and read_train_state(path).iteration >= last

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
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_eagle.checkpoint import TrainState, has_checkpoint, read_train_state
from megatron_eagle.config import apply_overrides, load_yaml, nearest
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.launcher import end_with_launcher
from megatron_eagle.training.run_config import RunConfig, complete_run_config
from megatron_eagle.training.train import starting, train

_NO_STAGE = ""  # the name of the one run of a file without stages
# Overrides of these change where all stages lie, not one stage's setting.
_COMMON_PATHS = ("checkpoint.path", "checkpoint.load", "logging.path")


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
    runs = _runs(path, overrides, stage)
    if list(runs) == [_NO_STAGE]:
        return [complete_run_config(runs[_NO_STAGE], world_size=world_size)]
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


def stage_settings(
    path: str | Path, overrides: Iterable[str] = (), *, stage: str | None = None
) -> dict[str, dict[str, Any]]:
    """Settings of the file's stages, or of `stage` alone, by name; of a file without stages under "".

    Raises:
        UserError: a stage does not exist, or an override is wrong.
    """
    runs = _runs(path, overrides, stage)
    return {name: run for name, run in runs.items() if stage is None or name == stage}


def _runs(path: str | Path, overrides: Iterable[str], stage: str | None) -> dict[str, dict[str, Any]]:
    """Settings of all runs that the file stands for, of which `stage` must be one."""
    values, overrides = load_yaml(path), list(overrides)
    sections = values.pop("stages", None)
    if sections is None:
        if stage is not None:
            raise UserError(f"{path}: it has no stages; leave out --stage {stage}")
        return {_NO_STAGE: apply_overrides(values, overrides)}
    names = _check_sections(sections, str(path))
    if stage is not None and stage not in names:
        guess = nearest(stage, names)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise UserError(f"{path}: there is no stage {stage!r}, only {', '.join(names)}{hint}")
    return _resolve(values, dict(zip(names, sections.values(), strict=True)), overrides)


def stage_names(path: str | Path) -> list[str]:
    """The stages of a file, in order.

    Raises:
        UserError: it has none.
    """
    sections = load_yaml(path).get("stages")
    return _check_sections(sections, str(path))


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


def _check_sections(sections: Any, where: str) -> list[str]:
    if not isinstance(sections, dict) or not sections:
        raise UserError(f"{where}: stages must map names to settings, as in `stages: {{stage1: {{...}}}}`")
    for name, section in sections.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise UserError(f"{where}: stage {name!r} names a folder: use letters, digits, '_', '-' and '.'")
        if not isinstance(section, dict):
            raise UserError(f"{where}: stages.{name}: expected the settings that this stage changes")
        if "model" in section:
            raise UserError(f"{where}: stages.{name}.model: set the one model of all stages at the top level")
        for place in _COMMON_PATHS:
            first, last = place.split(".")
            if last in (section.get(first) or {}):
                raise UserError(
                    f"{where}: stages.{name}.{place}: set {place} at the top level; every stage has a folder "
                    "of its name there, and starts from the stage before it"
                )
    return [str(name) for name in sections]


def _resolve(
    common: dict[str, Any], sections: dict[str, dict[str, Any]], overrides: list[str]
) -> dict[str, dict[str, Any]]:
    """Name -> settings of the run."""
    everywhere = [text for text in overrides if text.partition("=")[0].strip() in _COMMON_PATHS]
    common = apply_overrides(common, everywhere)
    rest = [text for text in overrides if text not in everywhere]
    runs: dict[str, dict[str, Any]] = {}
    previous = None
    for name, section in sections.items():
        run = apply_overrides(_merge(common, section), rest)
        for place in ("checkpoint", "logging"):
            root = (run.get(place) or {}).get("path")
            if root is not None:
                run[place]["path"] = os.path.join(str(root), name)
        if previous is not None and run.get("checkpoint"):
            run["checkpoint"]["load"] = runs[previous]["checkpoint"]["path"]
        runs[name], previous = run, name
    return runs


def _merge(common: Any, section: Any) -> Any:
    """Settings of `section` over those of `common`, level by level."""
    if not isinstance(common, dict) or not isinstance(section, dict):
        return section
    merged = dict(common)
    for key, value in section.items():
        merged[key] = _merge(common[key], value) if key in common else value
    return merged


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

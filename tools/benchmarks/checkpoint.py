"""Checkpoints: how long a save holds training up, blocking and asynchronous, and what it costs later steps.

One process and a model of some 80 million parameters in fp32 with all of its optimizer's state. The two kinds
of save take turns; the first turn, which allocates the host copy, is left out.

asynchronous save   the seconds in which training stands still, over the blocking save of the same turn
..., in all         and the time by which it slowed down the steps that ran while it was written
a step              of the optimizer alone over all parameters: bound by memory, it shows more than a real
                    step does what the background writer takes away
Megatron's gathering   what its own way to save this format (`fully_reshardable`) does before it writes, in an
                    asynchronous save too: every data parallel rank gets the whole optimizer state
"""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.report import Report, progress
from megatron.core.optimizer import MegatronOptimizer

from megatron_eagle.checkpoint import (
    CONTENT_METADATA,
    CheckpointConfig,
    CheckpointSaver,
    TrainState,
    checkpoint_folder,
)
from megatron_eagle.checkpoint.content import model_content
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.presets import EagleConfig, preset
from megatron_eagle.model.text import TextSection
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, build_scheduler, wrap_models

TURNS = 5


def run() -> Report:
    """Blocking and asynchronous saves in turns."""
    device = Device("cpu")
    with (
        tempfile.TemporaryDirectory() as folder,
        device.context(),
        process_group(device),
        model_parallel(ParallelConfig()) as mesh,
    ):
        models = build_model(_model(), mesh, device.torch_device, torch.float32)
        initialize_parameters(models, seed=1)
        wrapped = wrap_models(models)
        optimizer = build_optimizer(OptimizerConfig(lr=1e-5), wrapped)
        scheduler = build_scheduler(OptimizerConfig(), optimizer, 1000)
        for buffer in wrapped[0].buffers:
            buffer.grad_data.fill_(1e-3)
        optimizer.step()
        state: tuple[Any, ...] = wrapped, optimizer, scheduler, {"model": {}}
        return _measure(Path(folder), state, optimizer)


def _model() -> EagleConfig:
    section = preset("tiny")
    section.text = TextSection(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return section.with_data(vocab_size=8192, image_token_index=7)


def _save(saver: CheckpointSaver, state: tuple[Any, ...], turn: int, *, must_succeed: bool) -> None:
    models, optimizer, scheduler, config = state
    saver.save(models, optimizer, scheduler, config, TrainState(turn), must_succeed=must_succeed)


def _measure(root: Path, state: tuple[Any, ...], optimizer: MegatronOptimizer) -> Report:
    configs = {kind: CheckpointConfig(str(root / kind), keep_last=1, async_save=True) for kind in ("a", "b")}
    blocking, held, idle, beside, extra = [], [], [], [], []
    with (
        CheckpointSaver(configs["a"], progress) as in_foreground,
        CheckpointSaver(configs["b"], progress) as in_background,
    ):
        for turn in range(1, TURNS + 2):
            blocking.append(_seconds(partial(_save, in_foreground, state, turn, must_succeed=True)))
            idle.append(median(_seconds(optimizer.step) for _ in range(3)))
            held.append(_seconds(partial(_save, in_background, state, turn, must_succeed=False)))
            steps = []
            while in_background.saved_iteration != turn:
                steps.append(_seconds(optimizer.step))
                in_background.poll()
            beside.append(median(steps))
            extra.append(sum(steps) - len(steps) * idle[-1])
    folder = checkpoint_folder(root / "b")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e9
    content = model_content(state[0])
    gathering = _seconds(
        lambda: optimizer.sharded_state_dict(content, is_loading=False, metadata=dict(CONTENT_METADATA))
    )
    turns = [values[1:] for values in (blocking, held, idle, beside, extra)]
    ratios = [h / b for b, h, *_ in zip(*turns, strict=True)]
    in_all = [(h + e) / b for b, h, _, _, e in zip(*turns, strict=True)]
    rows = [
        {"what": "blocking save", "seconds": median(turns[0]), "over blocking": 1.0},
        {"what": "asynchronous save", "seconds": median(turns[1]), "over blocking": median(ratios)},
        {"what": "..., in all", "seconds": "", "over blocking": median(in_all)},
        {"what": "a step, no save", "seconds": median(turns[2]), "over blocking": ""},
        {"what": "a step beside a save", "seconds": median(turns[3]), "over blocking": ""},
        {"what": "Megatron's gathering", "seconds": gathering, "over blocking": ""},
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return Report(
        f"Saves of {size:.2f} GB, medians of {TURNS} turns; peak memory {peak:.1f} GB; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[1]:.0f}",
        rows,
    )


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

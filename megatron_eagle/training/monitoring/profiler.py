"""PyTorch's profiler over a window of iterations, on chosen ranks; one trace a rank in the run's logs.

A trace names what a step does: data, forward, backward, optimizer (and evaluation, save). Open it in
https://ui.perfetto.dev or chrome://tracing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.training.monitoring.observer import Observer, Step

PROFILES = "profile"
# Megatron's schedules name the parts of a step to their timers; the others keep Megatron's names.
_NAMES = {"forward-compute": "forward", "backward-compute": "backward"}


@dataclass
class ProfileConfig(Ranged):
    """Profile `steps` iterations from `start` (1-based) on each rank of `ranks`.

    Costs time and host memory while it lasts: a few iterations are enough.
    """

    start: Annotated[int, Range(1, 10**9)]
    steps: Annotated[int, Range(1, 1000)] = 1
    ranks: tuple[Annotated[int, Range(0, 10**6)], ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks:
            raise ValueError("ranks is empty: name at least one, from 0 on")


class StepProfiler(Observer):
    """Runs the profiler where `config` asks for it, from the begin to the end of an iteration. Left early, by
    an error or because the run is over, it writes what it has. A trace is named after its first iteration, so
    that another window of the same run, after a resume, keeps it."""

    def __init__(
        self, config: ProfileConfig | None, logs: Path, rank: int, schedule: ModelParallelConfig
    ) -> None:
        """`schedule` is the configuration that Megatron's schedules read (that of the first model chunk)."""
        self._config = config if config is not None and rank in config.ranks else None
        self._logs, self._rank, self._schedule = logs, rank, schedule
        self._profile: profile | None = None
        self._first = 0

    def __exit__(self, *exception: object) -> None:
        self._finish()

    def step_begins(self, iteration: int) -> None:
        """Start, if the window starts with this iteration (or was missed, by a resume inside it)."""
        config = self._config
        inside = config is not None and config.start <= iteration < config.start + config.steps
        if inside and self._profile is None:
            self._start(iteration)

    def step_ended(self, step: Step, tell: Observer) -> None:
        """Write the trace, if the window ends with this iteration."""
        config = self._config
        if config is not None and step.iteration >= config.start + config.steps - 1:
            self._finish()

    def _start(self, iteration: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._schedule.timers = RangeTimers()
        self._first, self._profile = iteration, profile(activities=activities)
        self._profile.start()

    def _finish(self) -> None:
        if self._profile is None:
            return
        self._schedule.timers = None
        self._profile.stop()
        folder = self._logs / PROFILES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"iter_{self._first:07d}_rank_{self._rank:05d}.json.gz"
            self._profile.export_chrome_trace(str(folder / name))
        except (OSError, RuntimeError) as error:  # a full disk must not end the run
            print(f"warning: {folder}: the trace could not be written: {error}", file=sys.stderr)
        self._profile = None


class RangeTimers:
    """Stands in for Megatron's timers: each becomes a named range of the trace."""

    def __init__(self) -> None:
        self._ranges: dict[str, _Range] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_Range":
        return self._ranges.setdefault(name, _Range(_NAMES.get(name, name)))


class _Range:
    def __init__(self, name: str) -> None:
        self._name = name

    def start(self, barrier: bool = False) -> None:
        self._range = record_function(self._name)
        self._range.__enter__()

    def stop(self, barrier: bool = False) -> None:
        self._range.__exit__(None, None, None)

"""One rank's run, from its groups to an evaluation: the trainer's code, on a machine that is not there."""

import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.rehearsal.gpu_types import GpuType
from megatron_eagle.rehearsal.machine import FakeMachine
from megatron_eagle.rehearsal.memory import Peak
from megatron_eagle.rehearsal.messages import RankMessage, Wait
from megatron_eagle.rehearsal.timeline import StepRecord
from megatron_eagle.training.evaluation import EvaluationConfig
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.saves import Saves
from megatron_eagle.training.setup import OpenLoader, Run, open_run
from megatron_eagle.training.train import standard_observers
from megatron_eagle.training.trainer import Trainer

STEPS = 2  # the first makes the optimizer's moments; the last one is reported


@dataclass
class RankReport:
    """What one rank's last step and evaluation were. Bytes, and counts of the whole step."""

    rank: int
    microbatches: int
    seconds: float
    failure: str | None = None  # a traceback, or why there is none
    peaks: dict[str, Peak] = field(default_factory=dict)  # by phase
    # (phase, whether once a microbatch, what, where, how often)
    syncs: list[tuple[str, bool, str, str, int]] = field(default_factory=list)
    problems: list[tuple[str, str, int]] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    # (phase, operator, how often, FLOPs, bytes)
    work: list[tuple[str, str, int, int, int]] = field(default_factory=list)
    events: list[RankMessage | Wait] = field(default_factory=list)  # of the whole run
    families: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    step: StepRecord | None = None  # where a timeline is asked for

    @property
    def stopped_by(self) -> str | None:
        """The failure in a line."""
        return None if self.failure is None else self.failure.strip().splitlines()[-1]

    @property
    def peak(self) -> int:
        """Bytes at most in the step or the evaluation."""
        return max((peak.nbytes for peak in self.peaks.values()), default=0)


def rehearsed_config(config: RunConfig, folder: str, microbatches: int, data_parallel: int) -> RunConfig:
    """`config` for a rehearsal: two steps with fresh weights, an evaluation at the end, nothing kept."""
    optimizer = replace(config.optimizer, lr_warmup_iterations=0)
    training = replace(
        config.training,
        train_iterations=STEPS,
        stop_at_iteration=None,
        global_batch_size=microbatches * data_parallel * config.data.packs_per_sequence,
    )
    logging = replace(
        config.logging,
        path=str(Path(folder, "logs")),
        tensorboard=False,
        wandb=None,
        progress=False,
        profile=None,
    )
    resilience = replace(config.resilience, stragglers=None)
    # Held out are training's own packs, or made up ones.
    evaluation = EvaluationConfig(str(config.data.folder), interval=STEPS, batches=1)
    changed: dict[str, Any] = {
        "training": training,
        "optimizer": optimizer,
        "logging": logging,
        "resilience": resilience,
        "checkpoint": replace(config.checkpoint, path=folder, load=None),
        "evaluation": evaluation,
        "data": replace(config.data, prefetch=False),
    }
    kept = {name: value for name, value in vars(config).items() if name != "notes"}
    return RunConfig(**kept | changed)


def rehearse_rank(
    config: RunConfig,
    gpu: GpuType,
    rank: int,
    world_size: int,
    open_loader: OpenLoader,
    microbatches: int,
    *,
    timeline: bool = False,
) -> RankReport:
    """Run `rank` of a job of `world_size`; once in a process, which has loaded the shim.

    Args:
        open_loader: of packs.
        microbatches: of a step, for each data parallel rank.
        timeline: keep all that the step does, in its order.
    """
    os.environ |= {"LOCAL_RANK": "0", "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ["LOCAL_WORLD_SIZE"] = str(min(8, world_size))
    machine, started, failure = FakeMachine(gpu), time.perf_counter(), None
    follower = None
    data_parallel = config.layout.data_parallel_size(world_size)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hf").mkdir()  # there is nothing to export
        run_config = rehearsed_config(config, folder, microbatches, data_parallel)
        try:
            with (
                machine.rank(rank, world_size),
                open_run(run_config, open_loader, initialize=_leave_unset) as run,
            ):
                _name_parts(machine, run)
                follower = _Follower(machine, run, timeline)
                Trainer(run, without_saves(run, follower)).train()
        except Exception:  # of any kind: it is what the rank is rehearsed for
            failure = traceback.format_exc()
    findings, work = machine.findings, machine.work
    return RankReport(
        rank,
        microbatches,
        time.perf_counter() - started,
        failure,
        machine.memory.peaks,
        [(*key, count) for key, count in sorted(findings.syncs.items())],
        [(*key, count) for key, count in sorted(findings.problems.items())],
        dict(findings.launches),
        [(*key, n, work.flops[key], work.nbytes[key]) for key, n in sorted(work.count.items())],
        machine.recorder.events,
        machine.recorder.families,
        None if follower is None else follower.record(rank),
    )


def without_saves(run: Run, instead: Observer) -> list[Observer]:
    """Who looks on when a run trains, with another in the place of who saves."""
    return [instead if isinstance(o, Saves) else o for o in standard_observers(run)]


def _leave_unset(_models: list[EagleModel], _seed: int) -> None:
    """Parameters have no values here."""


class _Follower(Observer):
    """Tells the machine where the step is, and forgets all but the last one."""

    def __init__(self, machine: FakeMachine, run: Run, timeline: bool) -> None:
        self._machine, self._run, self._timeline = machine, run, timeline
        self._first = self._first_message = 0
        self._last: tuple[int, int] | None = None  # events and kernels before the evaluation

    def step_begins(self, iteration: int) -> None:
        if iteration == STEPS:
            machine = self._machine
            machine.memory.name("moments", _moments(self._run))
            machine.memory.peaks.clear()
            machine.findings.syncs.clear()
            machine.findings.launches.clear()
            machine.work.clear()
            if self._timeline:
                recorder = machine.recorder
                self._first, self._first_message = len(recorder.events), len(recorder.messages)
                machine.work.events, machine.work.kernels = recorder.events, []

    def record(self, rank: int) -> StepRecord | None:
        """What the last step did, if that was asked for."""
        recorder, kernels = self._machine.recorder, self._machine.work.kernels
        if kernels is None:
            return None
        last_event, last_kernel = self._last or (len(recorder.events), len(kernels))
        step = [(before - self._first, phase, kernel) for before, phase, kernel in kernels[:last_kernel]]
        events = recorder.events[self._first : last_event]
        return StepRecord(rank, step, events, self._first_message, recorder.families)

    def phase(self, _iteration: int, name: str) -> None:
        kernels = self._machine.work.kernels
        if name == "evaluation" and kernels is not None:
            self._last = len(self._machine.recorder.events), len(kernels)
        self._machine.begin(name)


def _name_parts(machine: FakeMachine, run: Run) -> None:
    """What stays on the device, by kind."""
    buffers = [buffer for model in run.models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    memory = machine.memory
    memory.name("gradients", (buffer.grad_data for buffer in buffers))
    memory.name("parameters", (b.param_data for b in buffers if b.param_data is not None))
    memory.name("parameters", (p for model in run.models for p in model.parameters()))
    memory.name("main parameters", _parameters(run))


def _adams(run: Run) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        if getattr(part, "optimizer", None) is not None:
            yield part.optimizer


def _parameters(run: Run) -> Iterable[Tensor]:
    return (p for adam in _adams(run) for group in adam.param_groups for p in group["params"] if p.is_cuda)


def _moments(run: Run) -> Sequence[Tensor]:
    states = (state for adam in _adams(run) for state in adam.state.values())
    return [t for state in states for t in state.values() if isinstance(t, Tensor) and t.is_cuda]

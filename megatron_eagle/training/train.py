"""Run, or resume, one configuration: what is built, who looks on, and the steps."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from megatron_eagle.checkpoint import TrainState
from megatron_eagle.data.loading.loader import PackLoader
from megatron_eagle.errors import UserError
from megatron_eagle.training.evaluation import Evaluation
from megatron_eagle.training.forward_backward import run_packs
from megatron_eagle.training.monitoring.heartbeat import Heartbeat
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.monitoring.profiler import StepProfiler
from megatron_eagle.training.monitoring.run_log import RunLog
from megatron_eagle.training.monitoring.step_meter import StepMeter
from megatron_eagle.training.monitoring.stragglers import Stragglers
from megatron_eagle.training.resilience.faults import Faults
from megatron_eagle.training.resilience.outcome import RunOutcome
from megatron_eagle.training.resilience.owner import is_free
from megatron_eagle.training.resilience.policy import stop_signals
from megatron_eagle.training.resilience.restarts import Restarts
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.saves import Saves
from megatron_eagle.training.setup import OpenLoader, Run, choose_libraries, logs_folder, open_run
from megatron_eagle.training.trainer import Trainer


def standard_observers(run: Run, outcome: Path | None = None) -> list[Observer]:
    """Who looks on when a run trains. Their order is part of what they do: it is that in which they are told.

    After a step the profiler ends before the ranks compare, a save that has ended is reported before the
    step's numbers, and an evaluation is logged before a save that may end the run.

    Args:
        outcome: a file for `outcome.RunOutcome`.
    """
    config, rank, state = run.config, torch.distributed.get_rank(), run.state
    log = RunLog(
        config.logging,
        run.logs,
        active=rank == 0,
        iteration=state.iteration,
        last_iteration=config.training.last_iteration,
    )
    heart = _heartbeat(config, rank)
    profiler = StepProfiler(config.logging.profile, run.logs, rank, run.models[0].config)
    saves = Saves(run, log)
    restarts = Restarts(log, torch.distributed.get_world_size())
    stragglers = Stragglers(config.resilience.stragglers)
    observers: list[Observer] = [log, restarts, heart, profiler, stragglers]
    if outcome is not None:
        path = config.checkpoint.path
        observers.append(RunOutcome(outcome, path, state.iteration, saves.latest, active=rank == 0))
    if config.evaluation is not None and run.held_out is not None:
        forward = partial(run_packs, run, datasets=len(run.held_out.datasets), forward_only=True)
        device = run.device.torch_device
        observers.append(
            Evaluation(run.held_out, config.evaluation.interval, run.media, run.mesh, device, forward)
        )
    meter = StepMeter(
        run.device.torch_device,
        peak_tflops=run.peak.tflops,
        packs=config.training.global_batch_size,
        length=config.data.length,
        data=run.loader.identity,
    )
    return [*observers, saves, meter]


def train(
    config: RunConfig,
    *,
    open_loader: OpenLoader = PackLoader,
    observe: Callable[[Run], Sequence[Observer]] = standard_observers,
) -> TrainState:
    """Run (or resume) `config` on the processes of this job up to its last iteration. Collective.

    Args:
        config: of `load_run_config`, which checks and completes it.
        open_loader: opens what is read, of the run's data and of its held-out ones.
        observe: who looks on.
    Returns:
        Where the run stands.
    Raises:
        UserError: unreadable data or checkpoint, unwritable folders, a loss that its policy does not accept.
        Preempted: after a stop signal, when the checkpoint is saved.
    """
    with ExitStack() as opened:
        with starting(config):
            run = opened.enter_context(open_run(config, open_loader))
            observers = observe(run)
        with stop_signals() as stop:
            Trainer(run, observers, stop).train(notes(run))
        return run.state


@contextmanager
def starting(config: RunConfig) -> Iterator[None]:
    """This rank's heartbeat while its run is not there yet: where it meets the others and is built.

    A folder that is not there yet stays so until all ranks have agreed to run, and one that another run may
    write into is not touched. Where nothing can be written it does not beat; the run, which knows the other
    ranks, will say so.
    """
    known = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if known else int(os.environ.get("RANK", "0"))
    with ExitStack() as opened:
        write = logs_folder(config).is_dir() and is_free(config.checkpoint.path)
        with suppress(UserError):
            opened.enter_context(_heartbeat(config, rank, write=write))
        Faults.from_environment(rank).at_start()
        yield


def _heartbeat(config: RunConfig, rank: int, *, write: bool = True) -> Heartbeat:
    resilience = config.resilience
    return Heartbeat(
        logs_folder(config),
        rank,
        seconds=resilience.heartbeat_seconds,
        hang_seconds=60 * resilience.hang_minutes,
        abort=resilience.abort_on_hang,
        write=write,
    )


def notes(run: Run) -> Iterator[str]:
    """What the log of this start begins with, in a line each."""
    config, iteration, last = run.config, run.state.iteration, run.config.training.last_iteration
    yield from choose_libraries(config)
    yield run.loader.decoder
    yield run.peak.reason
    yield from config.notes
    if run.resumed:
        yield f"resumed from {Path(config.checkpoint.path)} at iteration {iteration}"
    if iteration >= last:
        yield f"nothing to do: the run ends at iteration {last}"

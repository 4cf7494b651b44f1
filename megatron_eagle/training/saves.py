"""When a run saves: at its interval, where it is told to stop, and at its end."""

from pathlib import Path
from typing import Self

import torch

from megatron_eagle.checkpoint import CheckpointSaver, bytes_to_save, check_space
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.observer import Observer, Step
from megatron_eagle.training.optimizer import gather_parameters
from megatron_eagle.training.setup import Run


class Saves(Observer):
    """The checkpoints of a run. A save that fails is reported and training goes on, except for a last one."""

    def __init__(self, run: Run, tell: Observer) -> None:
        """`tell` hears how each save ended; also those of another thread, in this one."""
        state, checkpoint = run.state, run.config.checkpoint
        self._run, self._interval, self._saves = run, checkpoint.save_interval, checkpoint.save
        self._saver = CheckpointSaver(
            checkpoint,
            tell.message,
            state.iteration if run.resumed else None,
            lambda iteration, reason: tell.event(iteration, "failed_save", reason),
        )

    def __enter__(self) -> Self:
        """Look whether there is room before the first step. Collective.

        Raises:
            UserError: on rank 0: there is not.
        """
        run = self._run
        config, rank = run.config.checkpoint, torch.distributed.get_rank()
        last, done = run.config.training.last_iteration, run.state.iteration
        if self._saves and config.check_space and done < last:
            size = torch.tensor(bytes_to_save(run.models, run.optimizer), device=run.device.torch_device)
            torch.distributed.all_reduce(size)
            if rank == 0:
                saves = saves_left(done, last, self._interval)
                check_space(Path(config.path), int(size), config.keep_last, saves)
        self._saver.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._saver.__exit__(*exception)

    def step_ended(self, step: Step, tell: Observer) -> None:
        self._saver.poll()

    def between_steps(self, step: Step, tell: Observer) -> None:
        last = step.is_last or step.told_to_stop
        if not self._saves or not last and (self._interval is None or step.iteration % self._interval):
            return
        self._save(step.iteration, tell, must_succeed=last)

    def told_to_stop(self, iteration: int, tell: Observer) -> None:
        if self._saves and iteration and self.saved() != iteration:
            self._save(iteration, tell, must_succeed=True)

    def _save(self, iteration: int, tell: Observer, *, must_succeed: bool) -> None:
        tell.phase(iteration, "save")
        run = self._run
        run.owner.check()
        try:
            run.faults.before_save(iteration)
        except AgreedError as error:
            if must_succeed:
                raise
            self._saver.failed(iteration, error)
            self._saver.check_failures()
            return
        gather_parameters(run.models)
        self._saver.save(
            run.models, run.optimizer, run.scheduler, run.config, run.state, must_succeed=must_succeed
        )

    def latest(self) -> int | None:
        """Iteration of the latest checkpoint that this rank knows of. Waits for nothing."""
        return self._saver.saved_iteration

    def saved(self) -> int | None:
        self._saver.wait()
        return self._saver.saved_iteration


def saves_left(done: int, last: int, interval: int | None) -> int:
    """How often a run saves from iteration `done` to its last one."""
    return 1 if interval is None else -(-last // interval) - done // interval

"""A training step, and the steps one after the other: global batch -> schedule -> verdict -> optimizer."""

import math
import time
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

from torch.profiler import record_function

from megatron_eagle.checkpoint import BatchRead
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.forward_backward import forward_backward
from megatron_eagle.training.monitoring.observer import Observer, Observers, Step
from megatron_eagle.training.resilience.policy import GO, Preempted, Verdict
from megatron_eagle.training.setup import Run

_NO_WEIGHT = "no sample of this step has weight in the loss"


class Trainer:
    """Trains what `setup.open_run` has built, or a `Run` that someone else put together.

    The step decides nothing about logs, profiles, evaluations or saves: whoever does is an observer.
    """

    def __init__(self, run: Run, observers: Sequence[Observer] = (), stop: Collection[str] = ()) -> None:
        """`stop` fills where this rank is told to end after the step under way (`policy.stop_signals`)."""
        self._run, self._tell, self._stop = run, Observers(observers), stop
        self._saves = run.config.checkpoint.save

    def train(self, notes: Iterable[str] = ()) -> None:
        """All steps up to the run's last iteration. Collective.

        Args:
            notes: what the observers' log begins with.
        Raises:
            AgreedError: an observer that cannot be opened, media that fail, a loss that the run's policy does
                not accept, a last checkpoint that cannot be saved.
            Preempted: told to stop, when everyone has done what is to be done between steps.
        """
        state = self._run.state
        with self._tell as tell:
            for note in notes:
                tell.message(note)
            while state.iteration < self._run.config.training.last_iteration:
                self._wait_for_data(state.iteration, tell)
                step = self.step()
                tell.step_ended(step, tell)
                tell.between_steps(step, tell)
                if step.told_to_stop and not step.is_last:
                    kept = "which is" if self._saves else "with checkpoint.save=false: not"
                    message = f"stopped by a signal after iteration {state.iteration}, {kept} saved"
                    self._preempted(message)

    def _wait_for_data(self, iteration: int, tell: Observer) -> None:
        """Return when the next batch can be read. Collective.

        Raises:
            AgreedError: it will not come.
            Preempted: told to stop meanwhile.
        """
        waiting, first_pack = self._run.waiting, self._run.state.consumed_packs
        try:
            there = waiting is None or waiting.until_there(first_pack, tell, iteration + 1, self._stop)
        except AgreedError:
            tell.told_to_stop(iteration, tell)  # what was trained is not lost
            raise
        if not there:
            tell.told_to_stop(iteration, tell)
            message = f"stopped by a signal while it waited for data, after iteration {iteration}"
            self._preempted(message)

    def _preempted(self, message: str) -> NoReturn:
        iteration = self._run.state.iteration
        self._tell.event(iteration, "preempted", message)
        raise Preempted(message, iteration if self._saves else None)

    def step(self) -> Step:
        """One global batch. Collective.

        Raises:
            AgreedError: as `train`.
        """
        run, state, guard, tell = self._run, self._run.state, self._run.guard, self._tell
        started, training = time.perf_counter(), run.config.training
        number, first_pack, lr = state.iteration + 1, state.consumed_packs, run.scheduler.get_lr({})
        tell.step_begins(number)

        tell.phase(number, "data")
        waiting = time.perf_counter()
        with record_function("data"):
            bad = run.faults.bad_media(number)
            batch = run.media.read(run.loader, first_pack, tell, number, "training", injected=bad)
        data_seconds = time.perf_counter() - waiting
        run.faults.before_step(number)

        tell.phase(number, "forward and backward")
        found = forward_backward(run, batch.microbatches, self._stop)
        loss = run.faults.loss(number, found.loss)

        tell.phase(number, "optimizer")
        run.faults.before_update(number)
        grad_norm, verdict = None, guard.judge("loss", loss) if batch.total else guard.skip(_NO_WEIGHT)
        if verdict == GO:
            grad_norm, verdict = self._update()
        if verdict == GO:
            guard.accept(loss)
        else:
            self._record(verdict, number, first_pack, loss)
        if verdict.action == "stop":
            raise AgreedError(self._why_stopped(number, verdict))

        run.scheduler.step(1)
        state.iteration += 1
        state.consumed_packs += training.global_batch_size
        state.recent_losses = guard.recent
        if run.waiting is not None:
            state.read = BatchRead(first_pack, training.global_batch_size, run.loader.identity(first_pack))
        return Step(
            iteration=number,
            is_last=number == training.last_iteration,
            loss=loss,
            aux_loss=found.aux_loss,
            grad_norm=grad_norm,
            lr=lr,
            totals=found.totals,
            datasets=found.datasets,
            first_pack=first_pack,
            seconds=time.perf_counter() - started,
            data_seconds=data_seconds,
            told_to_stop=found.told_to_stop,
        )

    def _update(self) -> tuple[float | None, Verdict]:
        """The optimizer's step: the gradients' norm (None: it was not taken), and what it means."""
        optimizer, guard = self._run.optimizer, self._run.guard
        if self._run.config.resilience.on_nonfinite == "skip":
            # The optimizer's own step would tell the norm only after it has moved the parameters.
            optimizer.prepare_grads()
            verdict = guard.judge("gradient norm", float(optimizer.get_grad_norm()))
            if verdict != GO:
                return None, verdict
        with record_function("optimizer"):
            grad_norm = float(optimizer.step()[1])
        return grad_norm, guard.judge("gradient norm", grad_norm)

    def _record(self, verdict: Verdict, iteration: int, first_pack: int, loss: float) -> None:
        """An event, which says where `train.py replay` finds the step's samples."""
        self._tell.event(
            iteration,
            "skipped" if verdict.action == "skip" else "stopped",
            verdict.reason,
            loss=loss if math.isfinite(loss) else None,
            first_pack=first_pack,
            packs=self._run.config.training.global_batch_size,
            data=self._run.loader.identity(first_pack).to_dict(),
        )

    def _why_stopped(self, iteration: int, verdict: Verdict) -> str:
        at = self._tell.saved()
        saved = "no checkpoint" if at is None else f"iteration {at}"
        return (
            f"iteration {iteration}: {verdict.reason}; stopped ({saved} is saved). Lower optimizer.lr or "
            "optimizer.clip_grad, or look at the samples of this step (tools/train.py replay)"
        )

"""Who looks on while a run trains: what an observer hears, and a list of them that is told in its order."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from megatron_eagle.runtime.agreement import agreed
from megatron_eagle.training.monitoring.dataset_losses import DatasetLosses
from megatron_eagle.training.monitoring.metrics import EvaluationMetrics, StepMetrics
from megatron_eagle.training.monitoring.step_totals import StepTotals


@dataclass(frozen=True)
class Step:
    """A finished iteration. Equal on all ranks, but for the clocks."""

    iteration: int  # 1-based: the number of finished iterations
    is_last: bool  # of this job
    loss: float
    aux_loss: float | None  # None: no router learns from one
    grad_norm: float | None  # None: the step was skipped
    lr: float  # of no part's group: without its multiplier
    totals: StepTotals
    datasets: DatasetLosses
    first_pack: int  # packs that the run had read before it
    seconds: float  # wall clock, data included
    data_seconds: float  # that the ranks waited for the last of them to have its batches
    told_to_stop: bool  # any rank


class Observer:
    """Looks on; is open from before the first step until after the last one, also where a step fails.

    Every method may be left as it is. `tell` are all observers of the run: what one of them finds, the others
    hear through it.
    """

    def __enter__(self) -> Self:
        """Open files, start threads. A `UserError` of any rank ends the run on all."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what was opened."""

    # What happens.

    def step_begins(self, iteration: int) -> None:
        """This iteration (1-based) begins."""

    def phase(self, iteration: int, name: str) -> None:
        """This iteration is now in a phase of `heartbeat.PHASES`; the one before is over."""

    def step_ended(self, step: Step, tell: "Observer") -> None:
        """All ranks have finished the step. May be collective, as all of the following may be."""

    def between_steps(self, step: Step, tell: "Observer") -> None:
        """Everyone has heard of the step. Who works with the model before the next one does it now."""

    def told_to_stop(self, iteration: int, tell: "Observer") -> None:
        """The run ends here, after this iteration: it was told to, or lacks data for the next one."""

    # What is said of it.

    def step(self, metrics: StepMetrics) -> None:
        """The numbers of a step that was not skipped."""

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """The numbers of an evaluation."""

    def event(self, iteration: int, kind: str, reason: str, **details: Any) -> None:
        """What is worth knowing of an iteration."""

    def message(self, text: str) -> None:
        """A line for who watches."""

    # What is asked.

    def saved(self) -> int | None:
        """Iteration of the latest checkpoint, after the save under way, for a run that is about to stop."""
        return None


class Observers(Observer):
    """Several observers as one. Opened and told in their order, closed in the reverse one.

    Where one cannot be opened, or a step fails, all that are open are closed.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._all = tuple(observers)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for observer in self._all:
                with agreed():
                    opened.enter_context(observer)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def step_begins(self, iteration: int) -> None:
        for observer in self._all:
            observer.step_begins(iteration)

    def phase(self, iteration: int, name: str) -> None:
        for observer in self._all:
            observer.phase(iteration, name)

    def step_ended(self, step: Step, tell: Observer) -> None:
        for observer in self._all:
            observer.step_ended(step, tell)

    def between_steps(self, step: Step, tell: Observer) -> None:
        for observer in self._all:
            observer.between_steps(step, tell)

    def told_to_stop(self, iteration: int, tell: Observer) -> None:
        for observer in self._all:
            observer.told_to_stop(iteration, tell)

    def step(self, metrics: StepMetrics) -> None:
        for observer in self._all:
            observer.step(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        for observer in self._all:
            observer.evaluation(metrics)

    def event(self, iteration: int, kind: str, reason: str, **details: Any) -> None:
        for observer in self._all:
            observer.event(iteration, kind, reason, **details)

    def message(self, text: str) -> None:
        for observer in self._all:
            observer.message(text)

    def saved(self) -> int | None:
        found = [observer.saved() for observer in self._all]
        return next((iteration for iteration in found if iteration is not None), None)

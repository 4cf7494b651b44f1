"""What a past iteration was, out of the run's own logs: its global batch, what was left out of it, its loss.

Nothing is multiplied out: batch size and data may have changed at any resume, and each step's record has its
own.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record
from megatron_eagle.training.monitoring.metrics import (
    EVENTS_FILE,
    METRICS_FILE,
    find_logs,
    read_events,
    read_steps,
)

_WINDOW = 64  # losses before a step that its jump is measured against
_NOT_TAKEN = ("skipped", "stopped")


@dataclass(frozen=True)
class PastStep:
    """An iteration of a run, taken or not."""

    iteration: int
    first_pack: int  # packs that the run had read before it
    packs: int  # of the global batch
    data: DataIdentity
    loss: float | None  # as logged; None: it was no number
    grad_norm: float | None  # None: the step was not taken
    not_taken: str | None  # why, if the optimizer did not step
    left_out: dict[int, str]  # samples by their number in the global batch, and which medium failed


class History:
    """The logs of a run.

    Attributes:
        logs: their folder.

    Raises:
        UserError: the folder has none.
    """

    def __init__(self, run: str | Path) -> None:
        logs = find_logs(run)
        if logs is None:
            raise UserError(
                f"{run}: no logs of a run; expected its folder of checkpoints with logs/{METRICS_FILE} (of a "
                "file of stages: that of one stage), or the folder of logs itself"
            )
        self.logs = logs
        self._steps = {step.iteration: step for step in read_steps(logs / METRICS_FILE)}
        self._events = read_events(logs / EVENTS_FILE)
        self._not_taken = {
            event["iteration"]: event for event in self._events if event.get("event") in _NOT_TAKEN
        }

    def step(self, iteration: int) -> PastStep:
        """An iteration.

        Raises:
            UserError: there is none, or no record of its global batch.
        """
        taken, event = self._steps.get(iteration), self._not_taken.get(iteration)
        if taken is None and event is None:
            raise UserError(f"{self.logs}: there is no iteration {iteration}; it has {self._there()}")
        record = vars(taken) if taken is not None else event or {}
        return PastStep(
            iteration=iteration,
            **self._batch_of(iteration, record),
            loss=record.get("loss"),
            grad_norm=None if taken is None else taken.grad_norm,
            not_taken=None if event is None else f"{event['event']}: {event.get('reason', '')}",
            left_out={
                failed["sample"]: failed.get("reason") or "its media failed"
                for failed in self._events
                if failed.get("event") == "failed_media"
                and failed["iteration"] == iteration
                and failed.get("of") == "training"
            },
        )

    def spike(self) -> tuple[int, str]:
        """The iteration to look at, and why: the last one whose loss or gradient norm the run did not accept,
        else the one whose loss stands highest above the median of those before it.

        Raises:
            UserError: nothing was refused, and the run has fewer than two steps.
        """
        # A step without any sample was skipped too: its loss is 0.
        refused = [event for event in self._not_taken.values() if event.get("loss") != 0]
        if refused:
            last = max(refused, key=lambda event: event["iteration"])
            return last["iteration"], f"{last['event']}: {last.get('reason')}"
        steps = [self._steps[iteration] for iteration in sorted(self._steps)]
        jumps = []
        for i, step in enumerate(steps[1:], 1):
            before = statistics.median(earlier.loss for earlier in steps[max(0, i - _WINDOW) : i])
            jumps.append((step.loss / max(before, 1e-9), step.iteration, step.loss, before))
        if not jumps:
            raise UserError(f"{self.logs}: no jump of the loss to look for in {self._there()}")
        ratio, iteration, loss, before = max(jumps)
        return iteration, f"the loss jumps to {loss:.4f}, {ratio:.2f} times the median before, {before:.4f}"

    def had_weights(self, saved: int, recent_losses: Sequence[float], after: int) -> bool:
        """Whether a checkpoint of iteration `saved` has the weights that the run had after an iteration: it
        looks back on the losses that were logged, and no step between the two was taken."""
        low, high = sorted((saved, after))
        between = (self._not_taken.get(iteration, {}) for iteration in range(low + 1, high + 1))
        if not all(event.get("event") == "skipped" for event in between):
            return False
        logged = [self._steps[i].loss for i in sorted(self._steps) if i <= saved]
        pairs = zip(reversed(logged), reversed(recent_losses), strict=False)  # both may begin later
        return bool(logged) == bool(recent_losses) and all(one == other for one, other in pairs)

    def _batch_of(self, iteration: int, record: dict[str, Any]) -> dict[str, Any]:
        try:
            return {
                "first_pack": int(record["first_pack"]),
                "packs": int(record["packs"]),
                "data": from_record(DataIdentity, record["data"] or {}),
            }
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.logs}: iteration {iteration} was logged by an older version, which did not record "
                "its global batch (first_pack, packs, data): it cannot be replayed"
            ) from None

    def _there(self) -> str:
        known = sorted(self._steps.keys() | self._not_taken.keys())
        return f"iterations {known[0]} to {known[-1]}" if known else "no finished iteration"

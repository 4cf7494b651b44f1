"""What a run does when it is told to stop, when a loss is not a number, and when it suddenly jumps."""

import contextlib
import math
import signal
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.training.monitoring.stragglers import StragglerConfig

# A run that was told to stop has saved and ends with this status (EX_TEMPFAIL of sysexits.h): start it again.
# torchrun ends with a status of its own; there, the one who sent the signal knows.
EXIT_REQUEUE = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class ResilienceConfig(Ranged):
    """Loss policy, heartbeat and hangs.

    `skip` leaves out the optimizer step of a global batch, records it in events.jsonl and goes on with the
    next, at most `max_consecutive_skips` times in a row. A spike is a loss above `spike_factor` times the
    median of the last `spike_window` losses; until there are so many, nothing is one.
    A rank that has not moved for `hang_minutes` is reported; `abort_on_hang` then ends the job, so that its
    launcher starts it again from the last checkpoint.
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient norm that is NaN or infinite
    on_spike: Literal["ignore", "skip", "stop"] = "ignore"  # a loss that jumps
    spike_factor: Annotated[float, Range(1.01, 1e6)] = 2.0
    spike_window: Annotated[int, Range(1, 100_000)] = 64
    max_consecutive_skips: Annotated[int, Range(1, 10**6)] = 10
    # Between two writes of a rank's heartbeat file; 0: no heartbeat.
    heartbeat_seconds: Annotated[float, Range(0.1, 3600, or_zero=True)] = 10.0
    # Above the longest start, step, save and evaluation.
    hang_minutes: Annotated[float, Range(0.01, 100_000)] = 20.0
    abort_on_hang: bool = False
    # Slow ranks by name, with nvidia-resiliency-ext; null: none.
    stragglers: StragglerConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.abort_on_hang and not self.heartbeat_seconds:
            raise ValueError("abort_on_hang needs the heartbeat, which finds hangs: heartbeat_seconds is 0")


class Verdict(NamedTuple):
    """What becomes of a step, and why."""

    action: Literal["go", "skip", "stop"]
    reason: str = ""


GO = Verdict("go")


class Preempted(Exception):
    """The run was told to stop by a signal. Not an error: it wants to run again.

    Attributes:
        iteration: after which it stopped, and which is saved; None: it is not (`checkpoint.save` is false).
    """

    def __init__(self, message: str, iteration: int | None) -> None:
        super().__init__(message)
        self.iteration = iteration


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect the names of stop signals in the yielded list while the block runs; handlers are put back.

    The first one only leaves its name, so that the step under way ends in order on every rank.
    """
    received: list[str] = []

    def remember(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LossGuard:
    """Judges each global loss. Its state is the last losses, saved with a checkpoint, so that a resumed run
    judges as the uninterrupted one would. The loss is equal on all ranks, hence so is the verdict."""

    def __init__(self, config: ResilienceConfig, recent: Iterable[float] = ()) -> None:
        self._config = config
        self._recent = deque(recent, maxlen=config.spike_window)
        self._skips = 0

    @property
    def recent(self) -> list[float]:
        """The losses that a spike is measured against, oldest first."""
        return list(self._recent)

    def judge(self, name: Literal["loss", "gradient norm"], value: float) -> Verdict:
        """What to do about a step with this value."""
        config = self._config
        if not math.isfinite(value):
            reason = f"the {name} is {value}"
            return self.skip(reason) if config.on_nonfinite == "skip" else Verdict("stop", reason)
        if name == "loss" and config.on_spike != "ignore" and self._is_spike(value):
            median = statistics.median(self._recent)
            reason = f"the loss {value:.4f} is above {config.spike_factor:g} times the recent {median:.4f}"
            return self.skip(reason) if config.on_spike == "skip" else Verdict("stop", reason)
        return GO

    def skip(self, reason: str) -> Verdict:
        """A step is left out for this reason, unless too many have been."""
        self._skips += 1
        if self._skips > self._config.max_consecutive_skips:
            end = f"{reason}, after {self._config.max_consecutive_skips} skipped steps in a row"
            return Verdict("stop", end)
        return Verdict("skip", reason)

    def accept(self, loss: float) -> None:
        """The step with this loss was taken."""
        self._skips = 0
        self._recent.append(loss)

    def _is_spike(self, loss: float) -> bool:
        full = len(self._recent) == self._config.spike_window
        return full and loss > self._config.spike_factor * statistics.median(self._recent)

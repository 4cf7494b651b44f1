"""Where the time of a training step goes, measured inside the training loop itself.

A clock of nested sections: each second belongs to the innermost one, so that the parts add up to the whole.
On a GPU every border waits for the device, which takes away what overlaps otherwise.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_eagle.model.eagle import EagleModel

PARTS = ("data", "vision", "language", "communication", "optimizer", "other")
_COLLECTIVES = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "barrier",
    "all_gather_object",
    "gather_object",
    "batch_isend_irecv",
)


class StepClock:
    """Seconds by part of `PARTS`; what no section covers is `other`. Serves as Megatron's timers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Begin again at zero."""
        self._settle()
        self.seconds.clear()

    @contextmanager
    def section(self, part: str) -> Iterator[None]:
        """Until it ends, time belongs to `part`."""
        self.push(part)
        try:
            yield
        finally:
            self.pop()

    def push(self, part: str) -> None:
        self._settle()
        self._stack.append(part)

    def pop(self) -> str:
        self._settle()
        return self._stack.pop()

    def settle(self) -> dict[str, float]:
        """The seconds so far."""
        self._settle()
        return dict(self.seconds)

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return _Timer(self, name)

    def _settle(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._stack[-1] if self._stack else "other"] += now - self._since
        self._since = now


class _Timer:
    """One of Megatron's timers, by its name."""

    def __init__(self, clock: StepClock, name: str) -> None:
        if name.endswith("-compute"):
            self._part = "language"
        elif "send" in name or "recv" in name or "all-" in name:
            self._part = "communication"
        else:
            self._part = "other"
        self._clock = clock

    def start(self, barrier: bool = False) -> None:
        self._clock.push(self._part)

    def stop(self, barrier: bool = False) -> None:
        while self._clock.pop() != self._part:  # the vision encoder's backward ends with the whole backward
            pass


def time_vision(clock: StepClock, eagle: EagleModel) -> None:
    """Count encoder and connector as vision: forward, and backward from where the gradient reaches them."""
    eagle.vision_model.register_forward_pre_hook(lambda *_: clock.push("vision"))

    def leave(module: torch.nn.Module, inputs: Any, features: Tensor) -> None:
        clock.pop()
        if features.requires_grad:
            features.register_hook(lambda _: clock.push("vision"))

    eagle.connector.register_forward_hook(leave)


@contextmanager
def timed_communication(clock: StepClock) -> Iterator[None]:
    """Count the collectives of torch.distributed, and the waits for asynchronous ones, as communication."""
    with ExitStack() as stack:
        for name in _COLLECTIVES:
            original = getattr(torch.distributed, name)
            timed = _timed(original, clock)
            for module in list(sys.modules.values()):  # Megatron also keeps them under names of its own
                for attribute, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
                    if value is original and module.__name__.startswith(("megatron", "torch.distributed")):
                        stack.enter_context(patch.object(module, attribute, timed))
        yield


def _timed(original: Callable[..., Any], clock: StepClock) -> Callable[..., Any]:
    @wraps(original)
    def collective(*arguments: Any, **settings: Any) -> Any:
        with clock.section("communication"):
            result = original(*arguments, **settings)
        if isinstance(result, list):
            return [_Work(work, clock) for work in result]
        return result if result is None else _Work(result, clock)

    return collective


class _Work:
    """A collective under way: waiting for it is communication."""

    def __init__(self, work: Any, clock: StepClock) -> None:
        self._work, self._clock = work, clock

    def wait(self, *arguments: Any) -> bool:
        with self._clock.section("communication"):
            return bool(self._work.wait(*arguments))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

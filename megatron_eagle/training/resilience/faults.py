"""Faults on purpose. FOR TESTS ONLY: nothing here happens unless the environment asks for it.

`MEGATRON_EAGLE_TEST_FAULTS` holds a JSON list of faults, each at the start of an iteration (1-based):
    {"kind": "kill", "rank": 1, "iteration": 5}      the process ends as by kill -9, in the step's first half
    {"kind": "kill_late", "rank": 1, "iteration": 5}     ... in its second half, before the optimizer
    {"kind": "kill_save", "rank": 1, "iteration": 5}     ... while the others save
    {"kind": "kill_start", "rank": 1, "iteration": 2}    ... before it meets the others, in restart 2
    {"kind": "stall", "rank": 1, "iteration": 5}     the process stands still, for 3600 s or "seconds"
    {"kind": "nan", "iteration": 5}                  the loss of this iteration counts as NaN, on all ranks
    {"kind": "spike", "iteration": 5}                ... as a hundred times what it is
    {"kind": "bad_media", "iteration": 5, "samples": [3]}   media of these samples of the global batch fail
    {"kind": "slow_save", "seconds": 2}              every save waits first
    {"kind": "failed_save", "iteration": 6}          the save after this iteration fails, on all ranks
With "host": NAME a fault happens on that host alone, whichever its ranks are; with "once": FILE only if FILE
does not exist, and makes it: not again after a restart.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_eagle.runtime.agreement import AgreedError

VARIABLE = "MEGATRON_EAGLE_TEST_FAULTS"


class Faults:
    """The faults that this rank is to suffer."""

    def __init__(self, faults: list[dict[str, Any]], rank: int) -> None:
        host = socket.gethostname()
        self._faults = [f for f in faults if f.get("rank", rank) == rank and f.get("host", host) == host]

    @classmethod
    def from_environment(cls, rank: int) -> "Faults":
        return cls(json.loads(os.environ.get(VARIABLE, "[]")), rank)

    def before_step(self, iteration: int) -> None:
        """Where the process is killed or stands still."""
        self._kill("kill", iteration)
        if fault := self._due("stall", iteration):
            time.sleep(fault.get("seconds", 3600))

    def at_start(self) -> None:
        """Where the process is killed before it has met the others."""
        self._kill("kill_start", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    def before_update(self, iteration: int) -> None:
        """Where the process is killed with its gradients."""
        self._kill("kill_late", iteration)

    def bad_media(self, iteration: int) -> list[int]:
        """Numbers of the samples of the global batch whose media this rank is not to read."""
        fault = self._due("bad_media", iteration)
        return [] if fault is None else fault["samples"]

    def before_save(self, iteration: int) -> None:
        """Where the disk is slow or full, and the process is killed."""
        self._kill("kill_save", iteration)
        if fault := self._due("slow_save", None):
            time.sleep(fault["seconds"])
        if self._due("failed_save", iteration):
            raise AgreedError(f"iteration {iteration} could not be saved: a fault for tests")

    def loss(self, iteration: int, loss: float) -> float:
        """The loss that the run is told."""
        if self._due("nan", iteration):
            return float("nan")
        return 100 * loss if self._due("spike", iteration) else loss

    def _kill(self, kind: str, iteration: int) -> None:
        if self._due(kind, iteration):
            os._exit(137)

    def _due(self, kind: str, iteration: int | None) -> dict[str, Any] | None:
        for fault in self._faults:
            if fault["kind"] == kind and fault.get("iteration") == iteration:
                if "once" in fault:
                    marker = Path(fault["once"])
                    if marker.exists():
                        continue
                    marker.touch()
                return fault
        return None

"""A run that is started again, as an event of it."""

import os
import socket

from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.monitoring.run_log import RunLog
from megatron_eagle.training.resilience.owner import Owner


class Restarts(Observer):
    """Tells of every start but the first, when its first step begins.

    A start that dies before has no event; the next one counts the restarts.
    """

    def __init__(self, log: RunLog, processes: int) -> None:
        self._log, self._processes, self._told = log, processes, False

    def step_begins(self, iteration: int) -> None:
        if self._told:
            return
        self._told, repeated, start = True, self._log.repeated, Owner.here(os.environ, 0)
        if iteration > 1 or repeated or start.requeues or start.restarts:
            self._log.event(
                iteration - 1,
                "resumed",
                f"{self._processes} processes go on, and repeat {repeated} iterations",
                processes=self._processes,
                repeated=repeated,
                job=start.job,
                requeues=start.requeues,
                restarts=start.restarts,
                host=socket.gethostname(),
            )

"""Waiting, for hours if need be, for a window of data that preprocessing has not finished.

The ranks wait together, in rounds of a second with one small reduction each, so that no collective lasts
long, a stop signal is heard, and all go on when the last of them sees the window (file systems of a network
may show it late). Whether preprocessing has died is rank 0's to say.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eagle.data.loading.follow import LOOK_SECONDS, FollowedPacks
from megatron_eagle.data.store.signs import Watch
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import raise_together
from megatron_eagle.training.monitoring.heartbeat import WAITING
from megatron_eagle.training.monitoring.observer import Observer

_SAY_SECONDS = 600.0  # between two lines that say that it still waits


@dataclass
class DataWait:
    """Lets a run wait for its next global batch.

    Attributes:
        path: of the store.
        count: packs of a global batch.
        dead_minutes: without a sign of life, after which preprocessing counts as dead.
        group: of `failed_media.host_group`.
    """

    packs: FollowedPacks
    path: str
    count: int
    dead_minutes: float
    group: dist.ProcessGroup | None
    _everywhere: int = 0  # packs up to here are there on every rank

    def until_there(self, first_pack: int, tell: Observer, iteration: int, stop: Collection[str]) -> bool:
        """Return when the batch that starts at `first_pack` can be read; False: told to stop instead.
        Collective.

        Raises:
            AgreedError: preprocessing has died, or the store was changed.
        """
        end = first_pack + self.count
        if end <= self._everywhere:
            return True
        watch, began, said = None, time.monotonic(), 0.0
        while True:
            there, problem = False, None
            try:
                there = self.packs.reach(end)
                if not there and watch is None:
                    watch = Watch(self.path)
                if watch is not None and not there and dist.get_rank() == 0:
                    problem = self._died(watch)
            except UserError as error:
                problem = str(error)
            missing, told, wrong, known = self._of_all(not there, bool(stop), problem is not None)
            if wrong:
                raise_together(problem, self.group)
            if not missing:
                self._everywhere = known
                if watch is not None:
                    waited = time.monotonic() - began
                    tell.event(iteration, "waited", f"{waited:.0f} s for data", seconds=round(waited, 1))
                return True
            if told:
                return False
            tell.phase(iteration, WAITING)
            if watch is not None and (not said or time.monotonic() - said >= _SAY_SECONDS):
                said = time.monotonic()
                tell.message(f"iteration {iteration} waits for {self.packs.awaited()}; {watch.words}")
            time.sleep(LOOK_SECONDS)

    def _of_all(self, *marks: bool) -> tuple[int, ...]:
        """Marks that any rank has, and the packs that every rank has found."""
        sums = torch.tensor([*map(int, marks), -len(self.packs)])
        dist.all_reduce(sums, dist.ReduceOp.MAX, group=self.group)
        *found, known = sums.tolist()
        return *found, -known

    def _died(self, watch: Watch) -> str | None:
        """What to say if preprocessing gives no sign of life any more."""
        silent = watch.look()
        if silent < 60 * self.dead_minutes:
            return None
        minutes = f"{silent / 60:.1f} minutes"
        return (
            f"{self.packs.awaited()} is not there, and there was no sign of life for {minutes} "
            f"(data.follow.dead_after_minutes): {watch.words}; start the same preprocess command again, then "
            "this run"
        )

"""The saves of a run, one at a time: in the foreground, or by a thread while training goes on.

An asynchronous save (`checkpoint.async_save`) holds training up for as long as it takes to copy this rank's
share into host memory, nothing more: no rank waits for another. A thread then writes, hashes and, together
with the other ranks' threads over a gloo group of their own, publishes. It needs no helper process: writing,
hashing and fsync work without the interpreter lock, a thread sees the copy without sending it anywhere, and
it dies with the process, so that a killed run leaves nobody behind who still writes.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eagle.checkpoint.files import HostCopy
from megatron_eagle.checkpoint.folder import TrainState
from megatron_eagle.checkpoint.saving import take_snapshot, write_snapshot
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.agreement import AgreedError


@dataclass
class CheckpointConfig(Ranged):
    """Where a run saves, resumes and starts from.

    `path` is saved to, and resumed from if it holds a checkpoint; otherwise `load` gives the initial weights
    (null: fresh ones). The last iteration is always saved, and every `save_interval` iterations before it.
    `async_save` writes those in the background, from a copy in host memory that every process keeps: its
    share of the checkpoint, which is 14 bytes for each parameter that it updates (bf16; without data
    parallelism) and is reported with the first save.
    `keep_last` deletes older ones after a save (null: none). `check_space` refuses a run before its first
    step where `keep_last` + 1 checkpoints do not fit (null: two), less those that it has. After
    `max_failed_saves` in a row a run stops: it would train for nothing. `verify` reads a checkpoint twice on
    loading: first to compare every file with its manifest. Without `save` nothing is saved, not even the last
    iteration: for measurements, whose states of 100 GB and more nobody wants.
    """

    path: str
    load: str | None = None
    save_interval: Annotated[int, Range(1, 10**9)] | None = None
    async_save: bool = False
    keep_last: Annotated[int, Range(1, 10**6)] | None = None
    check_space: bool = True
    max_failed_saves: Annotated[int, Range(1, 10**6)] = 3
    verify: bool = True
    save: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save and (self.save_interval is not None or self.async_save):
            raise ValueError("save is false: leave out save_interval and async_save, which are for saves")


class CheckpointSaver:
    """Saves what it is told to, and tells `report` in a line how each save ended.

    A save that fails (a full disk) is reported and training may go on: the last checkpoint stays. Enter it
    where the run starts, on all ranks; leaving it waits for the save under way, after an error too.

    Attributes:
        saved_iteration: of the latest checkpoint that this rank knows of; None: there is none.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        report: Callable[[str], None],
        saved_iteration: int | None = None,
        report_failure: Callable[[int, str], None] | None = None,
    ) -> None:
        """`report_failure`: hears of a failed save, with its iteration, in the place of `report`."""
        self.saved_iteration = saved_iteration
        self._report_failure = report_failure or (lambda _, reason: report(f"warning: {reason}"))
        self._config, self._report = config, report
        self._copy = HostCopy()
        self._failures = 0  # in a row
        self._pending: tuple[int, Future[Path]] | None = None

    def __enter__(self) -> "CheckpointSaver":
        if self._config.async_save:
            # A group of its own: collectives of another thread must not mix with those of training.
            self._group = torch.distributed.new_group(backend="gloo")
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        return self

    def __exit__(self, *_: object) -> None:
        if self._config.async_save:
            try:
                self.wait()
            finally:
                self._thread.shutdown()
                torch.distributed.destroy_process_group(self._group)

    def save(
        self,
        models: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        run_config: Any,
        state: TrainState,
        *,
        must_succeed: bool = False,
    ) -> None:
        """Save the run as it is now. Collective.

        An earlier save under way is waited for: there is memory for one.

        Args:
            must_succeed: the checkpoint is complete on return; else a failure is reported, and no error.

        Raises:
            AgreedError: it cannot be written, and must.
        """
        self._wait_for_earlier(state.iteration)
        self.check_failures()
        snapshot = take_snapshot(models, optimizer, scheduler, run_config, state)
        root, keep = Path(self._config.path), self._config.keep_last
        if self._config.async_save and not must_succeed:
            held = self._copy.nbytes
            snapshot = replace(snapshot, pieces=self._copy.fill(snapshot.pieces))
            if self._copy.nbytes > held:
                self._report(f"asynchronous saves hold {self._copy.nbytes / 1e9:.3f} GB of host memory here")
            written = self._thread.submit(write_snapshot, root, snapshot, keep, self._group)
            self._pending = (state.iteration, written)
            return
        try:
            write_snapshot(root, snapshot, keep)
        except AgreedError as error:
            if must_succeed:
                raise
            self.failed(state.iteration, error)
            self.check_failures()
        else:
            self._succeeded(state.iteration)

    def poll(self) -> None:
        """Report the save under way if it has ended. Does not wait, and needs no other rank."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if there is one, and report how it ended."""
        if self._pending is None:
            return
        (iteration, written), self._pending = self._pending, None
        try:
            written.result()
        except AgreedError as error:
            self.failed(iteration, error)
        else:
            self._succeeded(iteration)

    def failed(self, iteration: int, error: AgreedError) -> None:
        """The save of an iteration has failed, and the run goes on."""
        self._failures += 1
        self._report_failure(iteration, f"{error}; training goes on")

    def check_failures(self) -> None:
        """Whether too many have failed; where all ranks have heard of the same saves.

        Raises:
            AgreedError: they have.
        """
        if self._failures >= self._config.max_failed_saves:
            latest = "no checkpoint" if self.saved_iteration is None else f"iteration {self.saved_iteration}"
            raise AgreedError(
                f"{self._config.path}: {self._failures} saves in a row have failed "
                f"(checkpoint.max_failed_saves), and {latest} is saved: make room, and start again"
            )

    def _wait_for_earlier(self, iteration: int) -> None:
        self.poll()
        if self._pending is not None:
            earlier, started = self._pending[0], time.perf_counter()
            self.wait()
            seconds = time.perf_counter() - started
            self._report(
                f"the save of iteration {iteration} waited {seconds:.1f} s for that of iteration {earlier}: "
                "a longer checkpoint.save_interval or a faster disk avoids it"
            )

    def _succeeded(self, iteration: int) -> None:
        self.saved_iteration, self._failures = iteration, 0
        self._report(f"saved iteration {iteration} in {self._config.path}")

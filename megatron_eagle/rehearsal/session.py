"""Rehearsing many ranks: a job for each, and the processes in which they run."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eagle.errors import UserError
from megatron_eagle.rehearsal.shim import shim_file

if TYPE_CHECKING:
    from megatron_eagle.rehearsal.rank import RankReport
    from megatron_eagle.training.run_config import RunConfig
    from megatron_eagle.training.setup import OpenLoader


@dataclass(frozen=True)
class Job:
    """One rank of a job of `world_size`; the names are those of `rehearse_rank`."""

    config: "RunConfig"
    gpu: str
    rank: int
    world_size: int
    open_loader: "OpenLoader"
    microbatches: int
    before: Callable[[], None] | None = None  # changes the code that is rehearsed: for tests
    timeline: bool = False

    def run(self) -> "RankReport":
        """In this process, which is used up."""
        from megatron_eagle.rehearsal.gpu_types import find_gpu_type
        from megatron_eagle.rehearsal.rank import rehearse_rank

        if self.before is not None:
            self.before()
        gpu = find_gpu_type(self.gpu)
        return rehearse_rank(
            self.config,
            gpu,
            self.rank,
            self.world_size,
            self.open_loader,
            self.microbatches,
            timeline=self.timeline,
        )


def run_jobs(
    jobs: Sequence[Job],
    processes: int,
    tell: Callable[[int, "RankReport"], None] = lambda *_: None,
) -> "list[RankReport]":
    """The reports of all jobs, in their order.

    Args:
        processes: at the same time.
        tell: hears of each job that has ended, by its number.
    Raises:
        UserError: no compiler, or a process that was killed.
    """
    shim_file()  # said here, in one line, if it cannot be built
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_VISIBLE_DEVICES": ""}
    reports: dict[int, RankReport] = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "jobs").write_bytes(pickle.dumps(list(jobs)))
        command = [sys.executable, "-m", "megatron_eagle.rehearsal.server", folder, str(processes)]
        errors = Path(folder, "errors")  # a file: a pipe that nobody reads yet would fill and stop the ranks
        with (
            errors.open("w") as into,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=into, text=True, env=environment
            ) as server,
        ):
            assert server.stdout is not None
            try:
                for line in server.stdout:
                    number = int(line)
                    file = Path(folder, str(number))
                    if file.exists():
                        reports[number] = pickle.loads(file.read_bytes())
                        tell(number, reports[number])
            finally:
                server.kill()
        said = errors.read_text(errors="replace")
    if len(reports) < len(jobs):
        missing = next(job for number, job in enumerate(jobs) if number not in reports)
        last = (said.strip() or "killed, by the system's memory perhaps").splitlines()[-1]
        raise UserError(f"rehearse: rank {missing.rank} gave no report: {last}")
    return [reports[number] for number in range(len(jobs))]

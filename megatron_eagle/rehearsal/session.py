"""Rehearsing many ranks: a job for each, and the processes in which they run."""

import os
import pickle
import signal
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
        UserError: no compiler, or the process of all ranks has ended; a rank that was killed is a report.
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
                    number, status = map(int, line.split())
                    file = Path(folder, str(number))
                    if file.exists():
                        report = pickle.loads(file.read_bytes())
                    else:
                        report = _lost(jobs[number], status, errors)
                    reports[number] = report
                    tell(number, report)
                server.wait()
            finally:
                server.kill()
        said = errors.read_text(errors="replace")
    if len(reports) < len(jobs):
        last = (said.strip() or "it said nothing").splitlines()[-1]
        raise UserError(
            f"rehearse: the process of all ranks has ended with status {server.returncode}: {last}"
        )
    return [reports[number] for number in range(len(jobs))]


def _lost(job: Job, status: int, errors: Path) -> "RankReport":
    """Of a rank whose process has ended without one."""
    from megatron_eagle.rehearsal.rank import RankReport

    if status < 0:
        name = signal.Signals(-status).name
        why = f"killed by {name}; if the machine's memory was full, --processes with fewer takes less"
    else:
        last = errors.read_text(errors="replace").strip().rpartition("\n")[2]
        why = f"ended with status {status}: {last}"
    return RankReport(job.rank, job.microbatches, 0.0, why)

"""A process that has imported everything once, torch with the shim, and forks a process for each rank.

    python -m megatron_eagle.rehearsal.server FOLDER PROCESSES

Reads `FOLDER/jobs`, writes a report `FOLDER/N` for the N-th job, and a line with N and the exit status of its
process when that has ended. Started by `session.py`; both files are pickles of these two processes alone.
"""

import os
import pickle
import sys
import traceback
from pathlib import Path

from megatron_eagle.rehearsal.shim import load_shim


def serve(folder: Path, processes: int) -> None:
    """Run all jobs, so many at a time."""
    load_shim()
    _import_everything()
    from megatron_eagle.rehearsal.session import Job

    jobs: list[Job] = pickle.loads((folder / "jobs").read_bytes())
    running: dict[int, int] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < processes:
            number, job = waiting.pop(0)
            child = os.fork()
            if child == 0:
                _run(job, folder / str(number))
            running[child] = number
        child, status = os.wait()
        print(running.pop(child), os.waitstatus_to_exitcode(status), flush=True)


def _run(job: "Job", file: Path) -> None:  # type: ignore[name-defined]  # noqa: F821
    """In a process of its own, which ends here."""
    try:
        report = job.run()
        partial = file.with_suffix(".writing")
        partial.write_bytes(pickle.dumps(report))
        partial.rename(file)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _import_everything() -> None:
    """What a rank imports."""
    import warnings

    import torch

    warnings.simplefilter("ignore")  # of libraries, once a rank
    torch.set_num_threads(1)
    import megatron_eagle.rehearsal.rank  # noqa: F401


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))

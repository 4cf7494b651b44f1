"""The same run without faults, outside of Slurm: what its losses are compared with."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.training.monitoring.metrics import METRICS_FILE, StepMetrics, read_steps
from tests.cluster.soak.ledger import LOGS
from tests.cluster.soak.running import settings
from tests.paths import REPO


def uninterrupted(place: Path, layouts: Sequence[tuple[int, int]], last: int) -> list[StepMetrics]:
    """The steps of a run on this machine that changes its processes where the other did.

    Args:
        place: the seed's folder.
        layouts: pairs: after this iteration, so many processes.
        last: iteration.
    Raises:
        RuntimeError: it ends with an error.
    """
    run = place / "reference"
    shutil.rmtree(run, ignore_errors=True)
    ends = [start for start, _ in layouts[1:]] + [last]
    for (_, processes), end in zip(layouts, ends, strict=True):
        changed = (
            f"checkpoint.path={run}",
            "checkpoint.save_interval=100",
            f"training.stop_at_iteration={end}",
        )
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        result = subprocess.run(
            [
                sys.executable,
                *torchrun,
                "tools/train.py",
                "run",
                "--config",
                str(place / "run.yaml"),
                *changed,
            ],
            cwd=REPO,
            env=os.environ | settings(place),
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(
                f"the run without faults ends with {result.returncode}: {result.stderr[-3000:]}"
            )
    steps = read_steps(run / LOGS / METRICS_FILE)
    shutil.rmtree(run)
    return steps

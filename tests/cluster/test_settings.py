"""What the scripts are told about the cluster, on a real Slurm: network, container, names, comment, mail.

Apptainer is a script here that notes its node and runs the command as it is.
"""

import os
from pathlib import Path

import pytest

from tests.cluster.conftest import OPTIONS, TRAIN
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.slow
APPTAINER = """#!/bin/bash
echo "$SLURMD_NODENAME" >>{folder}/apptainer
while [[ $1 != *.sif ]]; do shift; done
exec "${{@:2}}"
"""


def test_a_job_with_all_settings(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    """Every command runs in the container, with the node's network; squeue shows where the run stands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apptainer").write_text(APPTAINER.format(folder=tmp_path))
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    network = tmp_path / "network.sh"
    network.write_text(f'export GLOO_SOCKET_IFNAME=eth0\necho "$(hostname)" >>{tmp_path}/network\n')
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "NETWORK": str(network),
        "CONTAINER_IMAGE": "eagle.sif",
        "COMMENT_SECONDS": "1",
        "LAUNCH": "srun",
        "CPU_BIND": "none",
    }
    options = (*OPTIONS, "--mail-user=someone", "--mail-type=BEGIN,END")
    settings = ("training.stop_at_iteration=60", "checkpoint.save_interval=4", "checkpoint.keep_last=1")
    job = slurm.submit(TRAIN, str(config), *settings, options=options, environment=environment)
    slurm.wait_until(lambda: " of 2000, saved " in said(slurm, job, "%k"), job)
    assert said(slurm, job, "%j") == "eagle-run"
    slurm.wait(job, "COMPLETED")
    assert said(slurm, job, "%k") == "iteration 60 of 2000, saved 60"
    assert f"container: eagle.sif, with {tmp_path}/bin/apptainer" in slurm.output(job)
    for file, nodes in (("apptainer", {"n1", "n2"}), ("network", {"n1", "n2"})):
        assert set((tmp_path / file).read_text().split()) == nodes
    mails = (slurm.folder / "mails").read_text()
    assert "someone" in mails and f"Job_id={job} Name=eagle-run Ended" in mails, mails


def said(slurm: Slurm, job: int, field: str) -> str:
    """A field of squeue, also of a job that has ended."""
    states = "--states=all"
    return slurm.call("squeue", "--noheader", states, f"--jobs={job}", f"--format={field}").stdout.strip()

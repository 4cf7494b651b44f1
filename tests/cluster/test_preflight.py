"""Before a job trains: a bad or slow node is named, and the job goes on without it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import OPTIONS, TRAIN
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.slow
SHORT = ("training.train_iterations=2",)


@pytest.fixture
def shaped(slurm: Slurm) -> Iterator[Slurm]:
    """Links slower than this machine's memory, so that they count; that of n2 ten times slower."""
    for name in slurm.names:
        slurm.shape(name, 40 if name == "n2" else 400)
    yield slurm
    slurm.cancel_all()
    for name in slurm.names:
        slurm.unshape(name)


def ailing_python(folder: Path, ills: dict[str, str]) -> str:
    """A Python whose preflight has faults of `tests.preflight.ailing` on nodes, or does not start there."""
    sick = 'exec "$python" -m tests.preflight.ailing {} -- "${{@:3}}"'
    cases = "".join(
        f"    {node}) {'exit 1' if ill == 'dead' else sick.format(ill)} ;;\n" for node, ill in ills.items()
    )
    script = folder / "python"
    asked = "if [[ $1 == tools/train.py && $2 == preflight ]]; then\n    case $SLURMD_NODENAME in\n"
    text = f'{asked}{cases}    esac\nfi\nexec "$python" "$@"\n'
    script.write_text(f"#!/bin/bash\npython={sys.executable}\n{text}")
    script.chmod(0o755)
    return str(script)


def test_a_slow_link_is_left_out(shaped: Slurm, config: Path) -> None:
    arguments = (str(config), *SHORT, "training.global_batch_size=3")
    options = ("--gpus-per-node=0", "--nodes=3")
    environment = {"PREFLIGHT": "yes", "EXCLUDE_SLOW": "1"}
    job = shaped.submit(TRAIN, *arguments, options=options, environment=environment)
    shaped.wait_for_requeue(job)
    done = shaped.wait(job, "COMPLETED")
    said = shaped.output(job)
    assert said.count("slow node: ") == said.count("slow node: n2: ") == 1
    assert "the preflight names n2" in said and "preflight: nothing stands in the way" in said
    assert done["NodeList"] == "n[1,3-4]"

    again = (*arguments, f"checkpoint.path={config.parent / 'other'}")
    options = (*options, "--exclude=n4")  # so that there is no other
    job = shaped.submit(TRAIN, *again, options=options, environment=environment)
    # It goes on to train, and the rest is as above.
    shaped.wait_for_line(job, "slow node: n2: ")
    shaped.wait_for_line(job, "saved iteration 2 ")
    assert "there are no other nodes, so that slow ones are only named" in shaped.output(job)
    assert shaped.job(job)["Restarts"] == "0"


def test_a_node_without_python_is_left_out(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    environment = {"PREFLIGHT": "yes", "PREFLIGHT_SECONDS": "10"}
    environment["PYTHON"] = ailing_python(tmp_path, {"n2": "dead"})
    options = (*OPTIONS, "--exclude=n3")
    job = slurm.submit(TRAIN, str(config), *SHORT, options=options, environment=environment)
    slurm.wait_for_requeue(job)
    # That a job goes on from there is seen above.
    again = slurm.wait(job, "RUNNING", restarts=1)
    said = slurm.output(job)
    assert "bad node: n2: " in said and "ended with status 1: can it import torch" in said
    assert "the preflight names n2" in said and "without n3,n2" in said, said
    assert again["NodeList"] == "n[1,4]"


def test_what_ails_nodes_is_named(slurm: Slurm, config: Path, tmp_path: Path) -> None:
    ills = {"n2": "clock=60 package=1.0", "n3": "read-only"}
    environment = {"PREFLIGHT": "yes", "MAX_REQUEUES": "0", "PYTHON": ailing_python(tmp_path, ills)}
    options = ("--gpus-per-node=0", "--nodes=4")
    batch = ("training.global_batch_size=4",)
    job = slurm.submit(TRAIN, str(config), *SHORT, *batch, options=options, environment=environment)
    slurm.wait(job, "FAILED")
    said = slurm.output(job)
    assert "bad node: n2: its clock is 60.0 s ahead of the others': is NTP on?" in said
    assert "bad node: n2: other than most nodes, which have what is in brackets: numpy 1.0 (" in said
    assert "bad node: n3: " in said and "cannot be written: Read-only file system" in said
    assert "MAX_REQUEUES is 0: not again" in said
    assert "bad node: n1" not in said and "bad node: n4" not in said

"""A checkpoint that one version of Megatron-Core saved, in another. `make test-megatron` makes the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO

NEWEST = REPO / ".venv-megatron-0.19.2" / "bin" / "python"
OLDEST = REPO / ".venv" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NEWEST.exists(), reason="no Megatron-Core 0.19.2: make test-megatron"),
]

TP2, PP2 = (2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})
AFTER, UNTIL = 2, 8


def run(python: Path, layout: tuple[int, dict], folder: Path, **options) -> dict:
    """Steps in `layout` by the Megatron-Core of the interpreter `python`."""
    world_size, parallel = layout
    file = folder / "options.json"
    file.write_text(json.dumps({"world_size": world_size, "parallel": parallel, **options}))
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    command = [str(python), "-W", "ignore", "-m", "tests.compatibility.megatron_steps", str(file)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("writer", "reader"), [(OLDEST, NEWEST), (NEWEST, OLDEST)], ids=["up", "down"])
def test_goes_on_under_the_other_version(writer, reader, tmp_path):
    saved = str(tmp_path / "saved")
    before = run(writer, TP2, tmp_path, until=AFTER, save=saved)
    same, other = (run(python, PP2, tmp_path, until=UNTIL, load=saved) for python in (writer, reader))
    assert {before["megatron"], other["megatron"]} == {"0.16.1", "0.19.2"}
    assert same["megatron"] == before["megatron"]
    assert other["start"] == same["start"] == [AFTER, 4 * AFTER]
    assert len(other["losses"]) == UNTIL - AFTER
    for name in ("losses", "norms"):
        assert other[name] == pytest.approx(same[name], rel=1e-6), name
    # A control: without the optimizer's state the first loss is the same and the later ones are not.
    lost = run(reader, PP2, tmp_path, until=UNTIL - AFTER, load=saved, weights_only=True)
    assert lost["losses"][0] == pytest.approx(same["losses"][0], rel=1e-6)
    assert lost["losses"] != pytest.approx(same["losses"], rel=1e-4)


def test_the_environment_of_this_run():
    """What ran the tests beside this one in `make test-megatron`."""
    ask = "import sys; from importlib.metadata import version; print(version('megatron-core'), sys.prefix)"
    said = subprocess.run([str(NEWEST), "-c", ask], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["0.19.2", str(NEWEST.parent.parent)]
    assert sys.prefix in (str(NEWEST.parent.parent), str(OLDEST.parent.parent))

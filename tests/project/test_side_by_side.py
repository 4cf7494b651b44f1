"""With several workers, files that start ranks run one after another, and a file stays together."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
RANKS = "from tests.parallel import harness"


def workers(folder: Path, *options: str) -> dict[str, set[str]]:
    """Which workers run the tests of each of four files, two of which start ranks."""
    for name, comment in (("test_a", RANKS), ("test_b", RANKS), ("test_c", ""), ("test_d", "")):
        tests = "".join(
            f"def test_{i}():\n    (Path(__file__).parent / f'{name}.{i}.{{os.environ[WORKER]}}').touch()\n"
            "    time.sleep(0.2)\n"
            for i in range(4)
        )
        head = f"# {comment}\nimport os, time\nfrom pathlib import Path\nWORKER = 'PYTEST_XDIST_WORKER'\n"
        (folder / f"{name}.py").write_text(head + tests)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        *options,
        str(folder),
    ]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    found: dict[str, set[str]] = {}
    for path in folder.glob("*.gw?"):
        name, worker = re.fullmatch(r"(\w+)\.\d\.(\w+)", path.name).groups()
        found.setdefault(name, set()).add(worker)
    return found


def test_files_that_start_ranks_share_a_worker(tmp_path):
    room = tmp_path / "tests" / "room"
    room.mkdir(parents=True)
    (tmp_path / "pytest.ini").touch()
    shutil.copy(CONFTEST, room.parent)
    found = workers(room)
    assert len(found) == 4
    assert all(len(names) == 1 for names in found.values()), found
    assert found["test_a"] == found["test_b"], found
    assert len(set.union(*found.values())) == 2, found


@pytest.mark.slow
def test_without_our_rule_they_do_not(tmp_path):
    """A negative control."""
    found = workers(tmp_path, "--dist", "load")
    assert any(len(names) == 2 for names in found.values()), found

"""Exports work with transformers 4.51 as with the newest; `make test-old-transformers` makes its venv."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.convert.media import write_picture, write_video
from tests.convert.small_eagles import SMALL_EAGLES, write_small_eagle
from tests.convert.use_export import CHECKS
from tests.inference.test_quick_start import PROGRAMS, brief, table  # noqa: F401
from tests.paths import REPO

OLD = REPO / ".venv-transformers-4.51" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OLD.exists(), reason="no transformers 4.51: make .venv-transformers-4.51"),
]


def run(python: Path | str, *arguments: str) -> str:
    """What a program prints, in an interpreter that sees neither this one's packages nor its settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    done = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(params=["tiny", *SMALL_EAGLES])
def any_export(request, tmp_path) -> Path:
    """That of each language model."""
    if request.param == "tiny":
        return request.getfixturevalue("exported")
    return write_small_eagle(request.param, tmp_path)


def test_the_same_model_in_both(any_export, request, tmp_path):
    picture, video = write_picture(tmp_path / "p.png", 256, 64), write_video(tmp_path / "v.mp4")
    found = {}
    for name, python in (("old", OLD), ("new", sys.executable)):
        script = str(REPO / "tests" / "convert" / "ask_export.py")
        run(python, script, str(any_export), str(picture), str(video), str(tmp_path / name))
        found[name] = load_file(tmp_path / name)
    old, new = found["old"], found["new"]
    assert old.keys() == new.keys()
    for name in old.keys() - {"logits"}:
        assert torch.equal(old[name], new[name]), name
    shown = new["attention_mask"].bool()  # what padding computes is nobody's answer
    assert not shown.all()
    name = request.node.callspec.params["any_export"]
    near = 1e-4 if name in SMALL_EAGLES and SMALL_EAGLES[name].rounded else 1e-5
    assert float((old["logits"] - new["logits"])[shown].abs().max()) < near
    assert run(OLD, "-c", "import transformers; print(transformers.__version__)").startswith("4.51.")


def test_what_people_do_with_an_export(exported, tmp_path):
    write_picture(tmp_path / "p.png", 200, 130)
    done = run(OLD, str(REPO / "tests" / "convert" / "use_export.py"), str(exported), str(tmp_path))
    assert done.split() == list(CHECKS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_quick_start(name, table, tmp_path):  # noqa: F811
    program, answers, _ = PROGRAMS[name]
    for old, new in table.items():
        program = program.replace(old, new)
    file = tmp_path / "program.py"
    file.write_text(program + ("\nthread.join()\n" if answers is None else ""))
    assert run(OLD, str(file)).strip()

"""The Pythons that are supported are the same wherever they are named.

Here tests run with one of them. With 3.12 and 3.13 the package was built, installed and compiled by hand, and
each pin of constraints-cpu.txt found a wheel; docs/install.md says so.
"""

import json
import os
import re
import subprocess
import sys
import tomllib

from tests.paths import REPO
from tests.project.package import declared


def supported() -> list[str]:
    """By the classifiers of the package, the oldest first."""
    return re.findall(r"Python :: (\d\.\d+)$", "\n".join(declared()["classifiers"]), re.MULTILINE)


def test_every_place_names_the_same():
    versions = supported()
    oldest, newest = versions[0], versions[-1]
    assert [int(version.split(".")[1]) for version in versions] == list(range(11, 14))
    assert declared()["python_requires"] == f">={oldest}"
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert settings["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert settings["mypy"]["python_version"] == oldest
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    named = " ".join(f"python{version}" for version in reversed(versions))
    assert f"PYTHONS := {named}\n" in makefile
    head = (REPO / "constraints-cpu.txt").read_text(encoding="utf-8").partition("\n")[0]
    assert re.findall(r"3\.\d+", head) == versions
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"python: {json.dumps(versions)}\n" in workflow
    for page in ("README.md", "docs/install.md"):
        assert f"Needs Python {oldest} to {newest} and make" in (REPO / page).read_text(encoding="utf-8")


def test_this_one_is_supported():
    assert "{}.{}".format(*sys.version_info) in supported()


def test_make_takes_the_newest_that_runs(tmp_path):
    """A name on PATH is not enough: version managers leave some that only say what they miss."""
    for version, works in (("3.13", False), ("3.12", True), ("3.11", True)):
        program = tmp_path / f"python{version}"
        program.write_text(f"#!/bin/sh\n{f'echo python{version}' if works else 'exit 127'}\n")
        program.chmod(0o755)
    shown = "shown:;@echo $(PYTHON)"

    def taken(path: str, **variables: str) -> str:
        environment = {"PATH": path, **variables}
        command = ["make", "--no-print-directory", "--eval", shown, "shown"]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    path = f"{tmp_path}:{os.defpath}"
    assert taken(path) == "python3.12"
    assert taken(path, PYTHON="pypy") == "pypy"

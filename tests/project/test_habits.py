"""What contributors are told holds: targets, hooks and templates are there and work."""

import re
import subprocess

import pytest
import yaml

from tests.paths import REPO

TARGETS = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def load(name: str) -> dict:
    return yaml.safe_load((REPO / name).read_text(encoding="utf-8"))


def targets_of(command: str) -> list[str]:
    """What `make` is told to make in a line of shell."""
    words = re.sub(r"\$\{\{.*?\}\}", "X", command).split()
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")]


def test_the_public_ci_makes_targets_that_exist():
    steps = load(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    made = [target for step in steps if "run" in step for target in targets_of(step["run"])]
    assert made == ["lint", "test"]
    assert set(made) <= TARGETS
    assert targets_of("make lint tset PYTHON=python3") == ["lint", "tset"] and "tset" not in TARGETS


HOOKS = load(".pre-commit-config.yaml")["repos"]


def test_hooks_are_local():
    assert [repo["repo"] for repo in HOOKS] == ["local"]


@pytest.mark.parametrize("hook", HOOKS[0]["hooks"], ids=lambda hook: hook["id"])
def test_a_hook_runs(hook, tmp_path):
    program, *words = hook["entry"].split()
    if program == "make":
        assert set(words) <= TARGETS
        return
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text('"""Empty."""\n')
    bad.write_text("import os\nx = {'a':1}\n")
    for file, expected in ((good, 0), (bad, 1)):
        check = ["--check"] if "format" in words else ["--isolated"]
        found = subprocess.run([REPO / program, *words, *check, file], cwd=REPO, capture_output=True)
        assert found.returncode == expected, found.stderr


@pytest.mark.parametrize(
    "form", sorted((REPO / ".github" / "ISSUE_TEMPLATE").iterdir()), ids=lambda f: f.name
)
def test_an_issue_form_asks(form):
    asked = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(asked)
    assert all(part["attributes"]["label"] for part in asked["body"])

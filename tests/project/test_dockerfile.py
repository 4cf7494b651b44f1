"""The image's recipe: everything that it names is pinned and exists. It is not built here."""

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from string import Template

import pytest

from tests.paths import REPO
from tests.project.package import declared

TEXT = (REPO / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with continued lines joined and ARG defaults put in."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", TEXT)).splitlines()
    found, defaults = [], {}
    for name, arguments in (line.split(maxsplit=1) for line in lines if line.strip()):
        arguments = Template(arguments).safe_substitute(defaults)
        if name == "ARG":
            defaults |= dict([arguments.split("=", 1)])
        found.append((name, arguments))
    return found


def extras() -> dict[str, list[str]]:
    """extras_require of setup.py."""
    return declared()["extras_require"]


def test_the_base_is_one_release_of_ngc():
    (base,) = [arguments for name, arguments in instructions() if name == "FROM"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)


def test_sources_are_commits_and_packages_are_versions():
    runs = " && ".join(arguments for name, arguments in instructions() if name == "RUN")
    clones = re.findall(r"git clone \S+ (\S+)", runs)
    checkouts = re.findall(r"git -C (\S+) checkout (\S+)", runs)
    assert [folder for folder, _ in checkouts] == clones != []
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for _, commit in checkouts)
    for command in re.findall(r"pip install ([^&]*)", runs):
        for word in command.split():
            assert word.startswith(("-", "'.[", "/opt/")) or re.fullmatch(r"[\w-]+==[\d.]+", word), word


def test_extras_exist_and_fit_the_base():
    runs = [arguments for name, arguments in instructions() if name == "RUN"]
    (named,) = re.findall(r"pip install [^&]*'\.\[([\w,]+)\]'", " && ".join(runs))
    known = extras()
    assert set(named.split(",")) == {"dali", "demo", "serve", "cluster"} <= known.keys()
    assert known["dali"] == ["nvidia-dali-cuda120==2.4.0"]


def test_the_build_fails_where_a_library_is_missing(monkeypatch):
    """The check at its end is run here, with libraries that are there and then without one of them."""
    (check,) = re.findall(r'python -c "(.*)"', "\n".join(a for name, a in instructions() if name == "RUN"))
    asked = []
    monkeypatch.setattr("importlib.metadata.version", asked.append)
    exec(check, {})
    assert {"torch", "transformer_engine", "flash_attn", "apex", "nvidia-dali-cuda120"} <= set(asked)
    monkeypatch.undo()
    with pytest.raises(PackageNotFoundError):
        exec(check.replace("torch", "no-such-library"), {})


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say():
    result = subprocess.run(["hadolint", str(REPO / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout

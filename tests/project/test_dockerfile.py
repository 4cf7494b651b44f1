"""The image's recipe: everything that it names is pinned and exists. It is not built here."""

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError
from string import Template

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.paths import REPO
from tests.project.package import declared
from tools.image import check_base

TEXT = (REPO / "Dockerfile").read_text()
BASE = tomllib.loads((REPO / "tools" / "image" / "base.toml").read_text(encoding="utf-8"))
VERSIONS = BASE["versions"]
IN_THE_IMAGE = {"dali-cuda13", "demo", "serve", "cluster", "monitor", "gpu"}


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


def run_lines() -> list[str]:
    return [arguments for name, arguments in instructions() if name == "RUN"]


def test_the_base_is_one_release_of_ngc_and_the_table_is_of_it():
    (base,) = [arguments for name, arguments in instructions() if name == "FROM"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert BASE["image"] == base
    assert all(row["source"].startswith(("image history", "assumed: ")) for row in VERSIONS.values())
    assert all(("minimum" in row) == ("why" in row) for row in VERSIONS.values())


def test_the_base_is_checked_before_anything_is_built():
    names = [name for name, _ in instructions()]
    (copied,) = [arguments for name, arguments in instructions()[: names.index("RUN")] if name == "COPY"]
    folder, place = copied.split()
    assert (REPO / folder / "check_base.py").is_file()
    assert run_lines()[0] == f"python {place}/check_base.py"
    needed = {name for name, row in VERSIONS.items() if "minimum" in row}
    assert needed == {"python", "torch", "triton", "cuda", "transformer-engine", "flash-attn", "apex"}


def test_a_base_that_is_too_old_or_lacks_something():
    """The base of before: CUDA 12.9, torch 2.8; and one without Apex."""
    old = {name: row["version"] for name, row in VERSIONS.items()}
    assert check_base.compare(VERSIONS, lambda name, _: old[name])[1] == []
    old |= {"cuda": "12.9", "torch": "2.8.0a0+5228986c39.nv25.6", "apex": None, "nccl": None}
    lines, faults = check_base.compare(VERSIONS, lambda name, _: old[name])
    assert len(lines) == len(VERSIONS)
    assert faults == [
        "cuda is 12.9: the extra dali-cuda13 needs 13.0; choose a newer BASE",
        "torch is 2.8.0a0+5228986c39.nv25.6: torchrun that passes signals on and waits for the last save "
        "(--shutdown-timeout) needs 2.12; choose a newer BASE",
        "apex is not in this base: layers.norm apex; multi-tensor norms and fused Adam where Transformer "
        "Engine is missing needs 0.1; choose another BASE",
    ]


def test_the_check_looks_at_what_is_here(capsys):
    """This environment is no base: it has torch and lacks Apex."""
    assert check_base.find("torch", VERSIONS["torch"]) == torch.__version__
    assert check_base.main() == 1
    out, err = capsys.readouterr()
    assert f"torch: {torch.__version__}; base.toml tells of" in out
    assert "apex is not in this base" in err and "Traceback" not in err


def test_what_setup_asks_for_is_in_the_base():
    """Every requirement of the package and its extras on something that the base has; DALI is replaced."""
    assert Version(VERSIONS["python"]["version"]) in SpecifierSet(declared()["python_requires"])
    asked = [*declared()["install_requires"], *(r for name in IN_THE_IMAGE for r in extras()[name])]
    found = {}
    for requirement in map(Requirement, asked):
        row = VERSIONS.get(requirement.name)
        if row is not None and not requirement.name.startswith("nvidia-dali"):
            found[requirement.name] = requirement.specifier.contains(row["version"], prereleases=True)
    assert found == dict.fromkeys(
        (
            "torch",
            "triton",
            "transformer-engine",
            "flash-attn",
            "nvidia-cudnn-frontend",
            "nvidia-resiliency-ext",
        ),
        True,
    )


def test_minimums_of_setup_are_those_that_are_supported():
    """Not what the image has: Triton from 3.3 (tests/runtime/test_older_libraries.py), that is torch 2.7."""
    asked = {r.name: r for r in map(Requirement, [*declared()["install_requires"], *extras()["gpu"]])}
    assert str(asked["torch"].specifier) == ">=2.7" and str(asked["triton"].specifier) == ">=3.3"
    for name in ("triton", "flash-attn", "transformer-engine"):
        assert str(asked[name].specifier) == f">={VERSIONS[name]['minimum']}"


def test_packages_are_versions_and_nothing_is_cloned():
    runs = " && ".join(run_lines())
    assert "git clone" not in runs, "pin its commit, and test that it is pinned"
    for command in re.findall(r"pip install ([^&]*)", runs):
        for word in command.split():
            assert word.startswith(("-", "'.[")) or re.fullmatch(r"[\w-]+==[\d.]+", word), word


def test_extras_exist_and_fit_the_base():
    (named,) = re.findall(r"pip install [^&]*'\.\[([\w,-]+)\]'", " && ".join(run_lines()))
    assert set(named.split(",")) == IN_THE_IMAGE - {"gpu"} <= extras().keys()
    assert extras()["dali-cuda13"] == [extras()["dali"][0].replace("cuda120", "cuda130")]


def test_the_bases_pins_of_dali_and_its_companions_are_dropped(tmp_path):
    """The RUN's own `sed`, on a list of pins with the companions that DALI has here."""
    pins = (REPO / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
    dali = [line.replace("12", "13", 1) for line in pins if line.startswith("nvidia-")]
    assert len(dali) > 4
    others = [
        "torch==2.13.0a0",
        "nvidia-resiliency-ext==0.6.0",
        "nvidia_cudnn_frontend==1.25.0",
        "numpy==2.1",
    ]
    file = tmp_path / "constraint.txt"
    file.write_text("\n".join([*others, *dali, "nvidia_dali_cuda130==2.2.0"]) + "\n")
    (command,) = re.findall(r"sed [^&]*", " && ".join(run_lines()))
    subprocess.run(shlex.split(command.replace("/etc/pip/constraint.txt", str(file))), check=True)
    assert file.read_text().splitlines() == others


def test_the_build_fails_where_a_library_is_missing(monkeypatch):
    """The print at its end is run here, with libraries that are there and then without one of them."""
    (check,) = re.findall(r'python -c "(.*)"', "\n".join(run_lines()))
    asked = []
    monkeypatch.setattr("importlib.metadata.version", asked.append)
    exec(check, {})
    assert {"torch", "transformer_engine", "flash_attn", "apex", "nvidia-dali-cuda130"} <= set(asked)
    monkeypatch.undo()
    with pytest.raises(PackageNotFoundError):
        exec(check.replace("torch", "no-such-library"), {})


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say():
    result = subprocess.run(["hadolint", str(REPO / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout

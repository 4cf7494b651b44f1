"""The wheel: its metadata, its files, what it needs, and its command, away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PathDistribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_eagle
from tests.paths import REPO
from tests.project.package import ROOTS, declared, imports, sources

# Distributions by what one imports of them, where the names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cudnn": "nvidia-cudnn-frontend",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda120",
    "pillow_heif": "pillow-heif",
    "yaml": "pyyaml",
}
# Files that only who has an extra imports.
OF_EXTRAS = {
    "megatron_eagle/commands/serve.py": "serve",
    "megatron_eagle/inference/demo.py": "serve",
    "megatron_eagle/data/media/dali_graph.py": "dali",
    "megatron_eagle/data/media/dali_runner.py": "dali",
    **{
        f"megatron_eagle/hf_model/vllm_plugin/{name}.py": "vllm"
        for name in ("media", "network", "processing", "renderer")
    },
}


def _name(requirement: str) -> str:
    return Requirement(requirement).name.lower()


def _undeclared(file: str, source: str) -> set[str]:
    needed = {_name(text) for text in declared()["install_requires"]}
    extras = {key: set(map(_name, texts)) for key, texts in declared()["extras_require"].items()}
    own = needed | extras.get(OF_EXTRAS.get(file, ""), set())
    at_choice = needed.union(*(names for key, names in extras.items() if key != "dev")) | {"triton"}
    return {
        library
        for library, optional in imports(source)
        if DISTRIBUTIONS.get(library, library).lower() not in (at_choice if optional else own)
    }


def test_what_is_imported_is_declared():
    missing = {}
    for path in sources():
        file = str(path.relative_to(REPO))
        if found := _undeclared(file, path.read_text(encoding="utf-8")):
            missing[file] = found
    assert not missing


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import nowhere.inner", {"nowhere"}),
        ("def f():\n    from nowhere import x", {"nowhere"}),
        ("import matplotlib", {"matplotlib"}),
        ("def f():\n    import matplotlib", set()),
        ("import os, torch\nfrom . import x\nfrom megatron_eagle import y", set()),
        ("import uvicorn", {"uvicorn"}),
    ],
)
def test_what_is_not_declared_is_found(source, found):
    assert _undeclared("megatron_eagle/new.py", source) == found


def test_exceptions_are_needed():
    for file, extra in OF_EXTRAS.items():
        source = (REPO / file).read_text(encoding="utf-8")
        names = set(map(_name, declared()["extras_require"][extra]))
        at_once = {
            DISTRIBUTIONS.get(library, library) for library, optional in imports(source) if not optional
        }
        assert names & at_once, file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy without network, by the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, folder)
    for root in ROOTS.values():
        shutil.copytree(root, folder / root.relative_to(REPO), ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder / "out"), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel is installed to, without what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    done = subprocess.run([*command, str(folder), str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, started elsewhere."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [str(folder / "bin" / "megatron-eagle"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(root)}"
        for package, root in ROOTS.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


def test_the_metadata_says_what_it_is(installed):
    (folder,) = installed.glob("megatron_eagle-*.dist-info")
    metadata = PathDistribution(folder).metadata
    assert metadata["Version"] == megatron_eagle.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (folder / "licenses" / "LICENSE").read_text() == (REPO / "LICENSE").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (REPO / "README.md").read_text(encoding="utf-8").strip()
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert all(re.fullmatch(r"\w[\w ]*, https://\S+", url) for url in metadata.get_all("Project-URL"))


def test_the_environment_has_what_the_wheel_needs():
    for text in declared()["install_requires"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), text


def test_the_command_runs_elsewhere(installed, tmp_path):
    listed = run(installed, "--help", cwd=tmp_path)
    assert listed.returncode == 0 and "  preprocess " in listed.stdout
    (tmp_path / "lines.jsonl").write_text("no JSON\n")
    lint = run(installed, "preview", "lint", "lines.jsonl", "--no-media", cwd=tmp_path)
    assert lint.returncode == 1 and "lines.jsonl:1: " in lint.stdout
    words = ("--preset", "eagle2.5-8b", "--gpus", "8", "--gpu", "h200", "--top", "1")
    plan = run(installed, "plan", *words, cwd=tmp_path)
    assert plan.returncode == 0 and "First: " in plan.stdout, plan.stderr
    wrong = run(installed, "pack", "--data", "nowhere", "--length", "8", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: nowhere is no token store")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_processes_in_an_environment_without_the_checkout(wheel, tmp_path):
    """The wheel in a venv, which sees the libraries of this one but not its link to the checkout."""
    venv.create(tmp_path / "env", symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(tmp_path / "env"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python, program = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "megatron-eagle"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import megatron_eagle; print(megatron_eagle.__file__)"]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run(where, **options).stdout.startswith(str(site))
    torchrun = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launched in (["-m", "megatron_eagle"], ["--no-python", str(program)]):
        words = ["train", "run", "--config", "missing.yaml"]
        done = subprocess.run([*torchrun, *launched, *words], **options)
        assert done.returncode and done.stderr.count("error: missing.yaml") == 1, done.stderr

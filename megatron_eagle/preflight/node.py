"""What a process of a preflight sees where it stands: code and packages, files, GPUs."""

import hashlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.data.media.source import check_size, open_bytes
from megatron_eagle.files import from_record, nearest_folder
from megatron_eagle.preflight.gpu_state import GpuState, read_gpus
from megatron_eagle.preflight.meeting import Process
from megatron_eagle.problems import Problem

_PACKAGES = ("megatron_eagle", "eagle_kernels")
# Further ones are counted: a file system that is not there lacks all of them.
_SHOWN = 3


@dataclass
class Report:
    """Of a process; what its node has in common, from the first one there.

    Attributes:
        cuda: the GPU that this process takes; None: it finds none.
        versions: of all that is installed, by name.
        there: each folder that is written -> the nearest one that exists.
        free: bytes where it lies.
        problems: what is wrong with what is read.
    """

    node: str
    rank: int
    local: int
    cuda: str | None = None
    gpus: list[GpuState] = field(default_factory=list)
    commit: str | None = None
    source: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    there: dict[str, str] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Report":
        """Out of JSON."""
        gpus = [GpuState(**gpu | {"slowdowns": tuple(gpu["slowdowns"])}) for gpu in record["gpus"]]
        return from_record(cls, record | {"gpus": gpus})


def look_at_node(process: Process, reads: dict[str, int], media: dict[str, int], writes: list[str]) -> Report:
    """What this process sees. Of files and packages only the first process of a node looks."""
    report = Report(process.node, process.rank, process.local)
    try:
        report.gpus = read_gpus()
    except Problem as problem:
        report.problems.append(str(problem))
    if torch.cuda.is_available() and process.device < torch.cuda.device_count():
        report.cuda = torch.cuda.get_device_name(process.device)
    if not process.is_first:
        return report
    report.commit, report.source, report.versions = _commit(), _source(), _versions(report.gpus)
    report.problems += _several(_unreadable(reads))
    report.problems += _several(_missing_media(media))
    for folder in writes:
        there = nearest_folder(Path(folder))
        report.there[folder] = str(there)
        report.free[folder] = shutil.disk_usage(there).free
    return report


def _several(problems: Iterator[str]) -> list[str]:
    found = list(problems)
    rest = len(found) - _SHOWN
    return found if rest <= 0 else [*found[:_SHOWN], f"{rest} other files likewise"]


def _unreadable(reads: dict[str, int]) -> Iterator[str]:
    """Files that are not as rank 0 found them."""
    for file, size in reads.items():
        try:
            with open(file, "rb") as opened:
                opened.read(1)
                found = opened.seek(0, 2)
        except OSError as error:
            yield f"{file} cannot be read: {error.strerror}: is its file system mounted here?"
            continue
        if found != size:
            yield f"{file} has {found} bytes here and {size} for rank 0: is it the same file system?"


def _missing_media(media: dict[str, int]) -> Iterator[str]:
    for path, size in media.items():
        try:
            check_size(path, size)
            with open_bytes(path) as file:
                file.read(1)
        except Problem as problem:
            yield f"{problem}: is its file system mounted here?"
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"


def _commit() -> str | None:
    """Of the checkout that is imported; None: it is none, or git cannot tell."""
    folder = Path(__file__).resolve().parent
    git = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _source() -> str:
    """A fingerprint of the code that is imported, committed or not."""
    whole = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            for file in sorted(Path(root).rglob("*.py")):
                whole.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return whole.hexdigest()[:12]


def _versions(gpus: list[GpuState]) -> dict[str, str]:
    found = {"Python": platform.python_version()}
    # What setuptools brings along is seen only where somebody has imported it.
    places = [place for place in sys.path if "_vendor" not in place]
    for package in importlib.metadata.distributions(path=places):
        name = package.metadata["Name"]
        if name is not None:  # what an installation that was broken off has left
            found.setdefault(name.lower().replace("_", "-"), package.version)
    if gpus:
        found["NVIDIA driver"] = gpus[0].driver
    return found

"""One real Slurm for all tests of this folder, free before each; where it starts, none is skipped."""

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_eagle.data.packing.index import write_packs
from tests.cluster.slurm import Slurm, missing
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.paths import REPO

TRAIN = REPO / "examples" / "slurm" / "train.sbatch"
LENGTH = 256
# What every job of these tests is given: nodes without GPUs, one process each.
OPTIONS = ("--gpus-per-node=0", "--nodes=2")
ONE_NODE = ("--gpus-per-node=0", "--nodes=1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and missing() is None:
        report.outcome, report.longrepr = "failed", f"skipped, where Slurm is installed: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Four nodes."""
    if reason := missing():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        slurm.environment |= {
            "REPO": str(REPO),
            "PYTHON": sys.executable,
            "RANK_LOGS": str(slurm.folder / "ranks"),
            "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
            "PROCESSES": "1",
            "PREFLIGHT": "no",  # which takes longer than most of these runs; test_preflight.py has it
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        yield slurm


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The nodes, with nothing to do before and after."""
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 samples."""
    folder = tmp_path_factory.mktemp("data")
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(40)]
    store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (LENGTH,))
    write_packs(store, LENGTH, seed=0)
    return Path(store)


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    """The file of a run of the smallest model into `tmp_path`/run, which ends after 2000 iterations."""
    sections = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(data), "length": LENGTH},
        "training": {"train_iterations": 2000, "global_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"path": str(tmp_path / "run")},
        "logging": {"progress": False, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "run.yaml"

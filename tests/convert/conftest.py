"""One tiny model in its three forms, made once: source folder, checkpoint, export."""

import shutil
from pathlib import Path

import pytest

from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from tests.convert.hf_folder import write_hf_folder


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder as somebody else published it. Do not write into it."""
    return write_hf_folder(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def broken(source, tmp_path) -> Path:
    """A copy of `source` to damage."""
    return Path(shutil.copytree(source, tmp_path / "broken"))


@pytest.fixture(scope="session")
def checkpoint(source, tmp_path_factory) -> Path:
    """`source`, imported. Do not write into it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
    import_hf(source, folder)
    return folder


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory) -> Path:
    """`checkpoint`, exported. Do not write into it."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_hf(checkpoint, folder)
    return folder

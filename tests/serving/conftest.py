"""The demo with heads that vLLM has on a CPU, trained once."""

import pytest

from tests.serving.server import train_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Its runs/demo."""
    return train_demo(tmp_path_factory.mktemp("demo"))

"""A run with the fused loss, in chunks, is the run with the plain one: the demo's claim, at a test's size."""

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from eagle_kernels.linear_cross_entropy import linear_cross_entropy
from megatron_eagle.model import language
from megatron_eagle.training.monitoring.metrics import read_metrics
from tests.parallel.harness import launch
from tests.training.test_training_loop import train_rank, write_run

CHUNK = 7  # tokens: several chunks a pack


def _train(config: str, overrides: list[str]) -> None:
    chunked = partial(linear_cross_entropy, chunk_size=CHUNK)
    with patch.object(language, "linear_cross_entropy", chunked):
        train_rank(config, 2, overrides)


def _losses(folder: Path, overrides: list[str]) -> list[float]:
    write_run(folder)
    launch(_train, 2, str(folder / "run.yaml"), [*overrides, "parallel.tensor_model_parallel_size=2"])
    return [m.loss for m in read_metrics(folder / "run" / "logs" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[float]:
    return _losses(tmp_path_factory.mktemp("plain"), ["layers.loss=plain"])


@pytest.mark.parametrize("into_main_grad", ["false", "true"])
def test_losses_are_those_of_the_plain_path(into_main_grad, plain, tmp_path):
    fused = _losses(tmp_path, ["layers.loss=fused", f"layers.loss_into_main_grad={into_main_grad}"])
    assert len(plain) == 6 and plain[-1] < plain[0]
    assert fused == pytest.approx(plain, rel=1e-6)

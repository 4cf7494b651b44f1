"""A run with the fused loss, in chunks, is the run with the plain one: the demo's claim, at a test's size."""

from functools import partial
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


@pytest.mark.parametrize("form", ["fused", "fused, main_grad"])
def test_losses_are_those_of_the_plain_path(form, tmp_path):
    fused = ["layers.loss=fused", f"layers.loss_into_main_grad={str('main_grad' in form).lower()}"]
    losses = {}
    for name, overrides in (("plain", ["layers.loss=plain"]), (form, fused)):
        folder = tmp_path / name
        folder.mkdir()
        write_run(folder)
        layout = ["parallel.tensor_model_parallel_size=2"]
        launch(_train, 2, str(folder / "run.yaml"), [*overrides, *layout])
        losses[name] = [m.loss for m in read_metrics(folder / "run" / "logs" / "metrics.jsonl")]
    assert len(losses["plain"]) == 6 and losses["plain"][-1] < losses["plain"][0]
    assert losses[form] == pytest.approx(losses["plain"], rel=1e-6)

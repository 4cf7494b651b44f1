"""Drawn sizes and layouts: what `check` accepts for N processes trains there as one process does, to 1e-5."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.preflight import check_runs
from megatron_eagle.training.stages import load_stages
from megatron_eagle.training.train import train
from tests.parallel.harness import launch
from tests.training.picture_run import write_picture_run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    return write_picture_run(tmp_path_factory.mktemp("run"))


def draw(seed: int) -> tuple[int, list[str], list[str]]:
    """Processes, settings of a model and its training, and a layout; about half are legal."""
    generator = np.random.default_rng(seed)
    pick = lambda *values: values[generator.integers(len(values))]  # noqa: E731
    tp, pp, cp, dp = pick(
        (2, 1, 1, 1),
        (3, 1, 1, 1),
        (4, 1, 1, 1),
        (2, 2, 1, 1),
        (1, 2, 2, 1),
        (1, 3, 1, 1),
        (2, 1, 2, 1),
        (1, 1, 4, 1),
        (1, 2, 1, 2),
        (1, 1, 2, 2),
        (1, 1, 1, 3),
        (2, 2, 2, 1),
    )
    chunks = pick(None, 1, 2) if pp > 1 else None
    kv_heads = pick(tp, 2 * tp, 2)
    heads, vision_heads = kv_heads * pick(1, 2), pick(tp, 2 * tp)
    sections = {
        "model.text": {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": heads * pick(4, 8),
            "intermediate_size": 24 * pick(1, 2),
            "num_hidden_layers": pp * (chunks or 1) * pick(1, 2) + pick(0, 0, 1),
            # 371 and 400 of 512 rows: with four ranks the last has no real one. 1400 are padded to 3 * 512.
            "vocab_size": pick(None, 400, 512, 513, 1400) if tp != 3 else pick(400, 1400, 1400),
            "tie_word_embeddings": pick(True, False, False),
        },
        "model.vision": {
            "num_attention_heads": vision_heads,
            "hidden_size": 8 * vision_heads,
            "intermediate_size": 24,
            "num_hidden_layers": pick(1, 2),
        },
        "training": {"global_batch_size": pick(2, 3, 4) * dp * pick(1, pp)},
        "layers": {"loss": pick("plain", "fused")},
        "recompute": {
            "language": pick("none", "selective", "full", "offload"),
            "vision": pick("none", "full"),
        },
    }
    layout = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "sequence_parallel": tp > 1 and pick(True, False),
        "virtual_pipeline_model_parallel_size": chunks,
        "num_layers_in_first_pipeline_stage": pick(None, None, 1) if pp > 1 else None,
        "ulysses_parallel_size": pick(1, 1, cp),
        "context_parallel_layout": pick("contiguous", "zigzag", "zigzag_per_document", "balanced"),
        "context_parallel_chunk_size": pick(None, 1, 16),
        "vision_sharding": pick("none", "cp", "cp_tp"),
        "overlap_grad_reduce": pick(True, False),
    }
    settings = [
        f"{place}.{name}={json.dumps(value)}"
        for place, section in sections.items()
        for name, value in section.items()
    ]
    extra = pick(
        [],
        ["lora.rank=3"],
        ["optimizer.trainable=[connector, new_token_rows]", f"optimizer.first_new_token={pick(0, 370)}"],
    )
    settings += extra
    layout["context_parallel_comm"] = pick("auto", "gather", "ranges", "ring")
    packs = pick(1, 2) if cp > 1 and layout["vision_sharding"] != "none" else 1
    layout["context_parallel_size"] = cp // packs
    sizes = [f"parallel.{name}={json.dumps(value)}" for name, value in layout.items()]
    return tp * pp * cp * dp, settings, [*sizes, f"data.packs_per_sequence={packs}"]


def train_rank(file: str, overrides: list[str], processes: int) -> None:
    """On each rank: one step."""
    with patch.object(os, "fsync", lambda _: None):
        train(*load_stages(file, overrides, world_size=processes))


def step(run_file: Path, overrides: list[str], processes: int) -> tuple[float, float]:
    """Loss and gradient norm of the step."""
    shutil.rmtree(run_file.parent / "run", ignore_errors=True)
    launch(train_rank, processes, str(run_file), overrides, processes, timeout=60)
    [metrics] = read_metrics(run_file.parent / "run" / "logs" / "metrics.jsonl")
    return metrics.loss, metrics.grad_norm


def accepted(run_file: Path, seed: int, *overrides: str) -> bool:
    """Whether `check` accepts the draw; then it has trained as one process does."""
    processes, settings, layout = draw(seed)
    settings += overrides
    shutil.rmtree(run_file.parent / "run", ignore_errors=True)
    try:
        check_runs(load_stages(run_file, [*settings, *layout], world_size=processes), processes)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    print(seed, processes, settings, layout)  # for who looks at a failure
    one = step(run_file, [*settings, "parallel={}"], 1)
    assert step(run_file, [*settings, *layout], processes) == pytest.approx(one, rel=1e-5)
    return True


@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_a_rank_without_real_vocabulary_rows(run_file, loss):
    """371 tokens in 512 rows over four ranks."""
    assert accepted(run_file, 38, f"layers.loss={loss}")


def test_three_ranks_divide_rows_that_they_can(run_file):
    """1400 tokens in 1536 rows."""
    assert accepted(run_file, 48)


@pytest.mark.slow
def test_drawn_layouts(run_file):
    assert sum(accepted(run_file, seed) for seed in range(60)) >= 30

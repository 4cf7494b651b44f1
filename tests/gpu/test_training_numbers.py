"""On a GPU: a step's peak memory and MFU are measured, and the profiler's trace holds kernels."""

import gzip
import json

import pytest
import torch

from megatron_eagle.training.monitoring.metrics import read_metrics
from tests.training.test_training_loop import train_rank, write_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_memory_mfu_and_kernels(tmp_path):
    write_run(tmp_path)
    settings = ["training.precision=bf16", "training.stop_at_iteration=3"]
    settings += ["logging.profile={start: 3}", "logging.peak_tflops=989"]
    train_rank(str(tmp_path / "run.yaml"), 1, settings)
    logs = tmp_path / "run" / "logs"
    for step in read_metrics(logs / "metrics.jsonl"):
        assert 0 < step.device_memory_gib < torch.cuda.get_device_properties(0).total_memory / 2**30
        assert step.mfu == pytest.approx(step.mfu_vision + step.mfu_language) and step.mfu_vision > 0
    with gzip.open(logs / "profile" / "rank_00000.json.gz") as trace:
        events = json.load(trace)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert {"data", "forward", "backward", "optimizer"} <= {event.get("name") for event in events}

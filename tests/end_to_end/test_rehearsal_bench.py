"""The comparison of a rehearsed step with a real one: what it reads of either, and what it refuses."""

import sys

import pytest
import torch

from megatron_eagle.errors import UserError
from tests.paths import REPO

REPORT = """run: 1 x NVIDIA H100 80GB HBM3 (132 multiprocessors: datasheet), one process
device memory, rank 0, which has most (GB, in blocks of 512 bytes):
  peaks by rank: 0: 21.50
the host waits for the device 0.5 times a microbatch and 4 times a step:
  12.1 TFLOP, 900.3 GB read and written, 2400 kernels
"""
TRACE = {
    "traceEvents": [
        *[{"cat": "kernel", "name": "gemm"}] * 2000,
        *[{"cat": "cuda_runtime", "name": "cudaStreamSynchronize"}] * 9,
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"name": "data"},
    ]
}


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    from benchmarks import rehearsal

    yield rehearsal
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_a_row_for_each_figure(rehearsal):
    real = rehearsal.count_events(TRACE) | {"peak GB": 20.0}
    rows = rehearsal.compare(rehearsal.read_rehearsal(REPORT), real)
    assert {row["what"]: (row["rehearsed"], row["real"]) for row in rows} == {
        "peak GB": (21.5, 20.0),
        "kernels a step": (2400, 2000),
        "waits of the host": (4.5, 9),
    }
    assert [row["rehearsed / real"] for row in rows] == pytest.approx([1.075, 1.2, 0.5])


@pytest.mark.parametrize("missing", ["peaks by rank", "kernels", "the host waits"])
def test_a_report_that_says_less_is_an_error(missing, rehearsal):
    with pytest.raises(RuntimeError, match="the rehearsal does not say its"):
        rehearsal.read_rehearsal(REPORT.replace(missing, "something else"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_gpu(rehearsal):
    with pytest.raises(UserError, match="rehearsal needs a CUDA device"):
        rehearsal.run()

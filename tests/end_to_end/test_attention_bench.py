"""The attention benchmark: what it needs, the work that it counts, and that its two ways to call agree."""

import importlib
import subprocess
import sys

import pytest
import torch

from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from tests.paths import REPO


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tools")
    return importlib.import_module("benchmarks.attention")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_gpu_it_says_so_in_one_line():
    command = [sys.executable, str(REPO / "tools" / "bench.py"), "attention"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr == "error: bench.py attention measures GPU kernels and there is no CUDA device here\n"
    )


def test_the_share_is_an_eighth_of_the_work(attention):
    for length in attention.LENGTHS:
        segments, pairs = attention.share(length)
        assert segments[-1].q_end == length // 8
        assert pairs == pytest.approx(length * (length + 1) / 2 / 8, rel=0.01)


def test_head_by_head_is_all_heads_at_once(attention):
    """And autograd's gradients are those of the pair."""
    task, reference = attention.Task(256, device="cpu"), ReferenceAttention()

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = reference.forward(q, k, v, task.segments, attention.SCALE, causal=True)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            grads = reference.backward(grad, *ctx.saved_tensors, task.segments, attention.SCALE, causal=True)
            return tuple(x.to(task.q.dtype) for x in grads)

    results = []
    for run in (task.by_backend(reference), task.by_autograd(Whole.apply)):
        out, backward = run()
        results.append([out, *backward()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.to(expected.dtype), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_every_contestant_is_measured(attention):
    rows = {row["attention"]: row for row in attention.measure(8192)}
    assert rows["SDPA flash, square"]["TFLOP/s"] > 0
    compared = [row["off"] for row in rows.values() if row["off"] != "-"]
    assert compared and max(compared) < 1e-2

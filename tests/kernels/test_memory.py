"""Memory of the chunked loss and of offloaded layers: their formulas', and far less than their peers'."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import REPO

START = """
import json, torch
from benchmarks import activation_offload, linear_ce
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
torch.set_num_threads(1)
device = detect_device()
with device.context(), process_group(device), model_parallel(ParallelConfig()) as mesh:
"""
LOSSES = "print(json.dumps(linear_ce.measure(6144, 2048, 6144) + linear_ce.measure(6144, 2048, 900)))"
LAYERS = """print(json.dumps([
    activation_offload.measure(mesh, layers, 512, policy)
    for layers in (3, 8) for policy in ("none", "full", "offload")
]))"""


def _measured(statement: str) -> list[dict]:
    environment = os.environ | {
        "PYTHONPATH": f"{REPO / 'tools'}:{REPO}:{REPO / 'kernels'}",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", f"{START}    {statement}"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory_of_the_loss_is_the_formulas():
    rows = _measured(LOSSES)
    for row in rows:
        assert row["dx off"] < 1e-6 and row["value off"] < 1e-6
        if row["loss"].startswith("fused"):
            assert row["peak MB"] == pytest.approx(row["formula MB"], rel=0.1)
    of = {(row["supervised"], row["loss"]): row["peak MB"] for row in rows}
    assert of[6144, "fused"] < 0.5 * of[6144, "Megatron-Core"] < 0.5 * of[6144, "plain torch"]
    assert of[900, "fused"] < 0.5 * of[6144, "fused"]


@pytest.mark.slow
def test_peak_memory_of_offloaded_layers_is_the_formulas_and_does_not_grow_with_depth():
    rows = _measured(LAYERS)
    for row in rows:
        assert row["peak MB"] == pytest.approx(row["formula MB"], rel=0.15), row
    of = {(row["layers"], row["recompute"]): row["peak MB"] for row in rows}
    assert len({row["loss"] for row in rows}) == 2  # of either depth: one loss, bit for bit
    assert of[8, "offload"] < 1.03 * of[3, "offload"]
    assert of[8, "offload"] < of[8, "full"] < 0.5 * of[8, "none"]
    assert of[8, "full"] - of[3, "full"] == pytest.approx(5 * 512 * 256 * 4 / 1e6, rel=0.15)

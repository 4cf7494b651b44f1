"""Memory of the chunked output layer and loss: what its formula says, and far less than its peers."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import REPO

CODE = """
import json, torch
from benchmarks.linear_cross_entropy import measure
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
device = detect_device()
with device.context(), process_group(device), model_parallel(ParallelConfig()):
    print(json.dumps(measure(6144, 2048, 6144) + measure(6144, 2048, 900)))
"""


def test_peak_memory_is_the_formulas():
    environment = os.environ | {"PYTHONPATH": f"{REPO / 'tools'}:{REPO}", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        assert row["dx off"] < 1e-6 and row["value off"] < 1e-6
        if row["loss"].startswith("fused"):
            assert row["peak MB"] == pytest.approx(row["formula MB"], rel=0.1)
    of = {(row["supervised"], row["loss"]): row["peak MB"] for row in rows}
    assert of[6144, "fused"] < 0.5 * of[6144, "Megatron-Core"] < 0.5 * of[6144, "plain torch"]
    assert of[900, "fused"] < 0.5 * of[6144, "fused"]

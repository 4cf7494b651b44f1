"""The kernels' benchmark: refused without a GPU, and its parts run at sizes that a CPU takes."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_eagle.errors import UserError
from tests.paths import REPO

SMALL = """
import json, torch
from benchmarks import activation_offload, kernels
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
kernels.REPEATS = 1
copy = kernels.copy_bandwidth("cpu", 1024)
rows = kernels.elementwise(8, "cpu", torch.float32, (64, 96, 32, 2), copy)
device = detect_device()
with device.context(), process_group(device), model_parallel(ParallelConfig()) as mesh:
    rows += kernels.offload_rows(mesh, activation_offload.model(2), 64, torch.float32, "cpu")
print(json.dumps(rows))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    "arguments", [("kernels",), ("linear_ce", "--device", "cuda")], ids=["kernels", "linear_ce"]
)
def test_refused_without_a_gpu(arguments, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tools")
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(UserError, match="there is no CUDA device here"):
        importlib.import_module("bench").main()


def test_its_parts_give_rows_of_one_shape():
    environment = os.environ | {
        "PYTHONPATH": f"{REPO / 'tools'}:{REPO}:{REPO / 'kernels'}",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", SMALL]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(row) for row in rows}) == 1
    kernels = {row["kernel"] for row in rows}
    assert {"rms_norm forward", "swiglu backward", "rope backward", "layer_norm forward"} < kernels
    assert [row["form"] for row in rows][-2:] == ["all stay", "all leave"]

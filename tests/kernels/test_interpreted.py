"""The Triton kernels in the interpreter, and what they refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch

from eagle_kernels import dispatch
from eagle_kernels.configurations import ARCHITECTURES, configuration
from eagle_kernels.dispatch import explain
from eagle_kernels.layer_norm import layer_norm
from eagle_kernels.rms_norm import rms_norm
from eagle_kernels.rope import rope
from eagle_kernels.swiglu import swiglu
from tests.kernels.interpreted import CHECKS, LIMITS
from tests.paths import REPO

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def results() -> dict:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_equals_fp64(check, dtype, results):
    name = f"{check.__name__} {dtype}"
    if name not in results:
        pytest.skip("liger-kernel is not installed")
    errors = results[name]
    assert {name: error for name, error in errors.items() if not error <= LIMITS[dtype]} == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_equals_fp64_on_a_gpu(check, dtype):
    torch.manual_seed(0)
    with torch.device("cuda"):
        errors = check(dtype)
    assert {name: error for name, error in errors.items() if not error <= LIMITS[dtype]} == {}


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    cuda = torch.device("cuda")
    assert explain("auto", cuda) == (False, "eager (auto: triton is not installed)")
    with pytest.raises(ValueError, match="kernels triton: triton is not installed; choose auto or eager"):
        explain("triton", cuda)


@pytest.mark.parametrize(
    ("capability", "entry"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 100)]
)
def test_a_gpu_gets_the_newest_entry_that_is_not_newer(capability, entry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configuration.__wrapped__(torch.device("cuda")) is ARCHITECTURES[entry]


def test_a_gpu_older_than_the_table_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="compute capability 7.5 is below 8.0; choose eager"):
        configuration.__wrapped__(torch.device("cuda"))


def test_auto_is_eager_without_cuda():
    assert explain("auto", torch.device("cpu")) == (
        False,
        "eager (auto: the tensors are on cpu, not on CUDA)",
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rms_norm(torch.ones(2, 32), torch.ones(32), 1e-6, "triton"),
            "on cpu, not on CUDA; choose",
        ),
        (lambda: rms_norm(torch.ones(2, 32), torch.ones(16), 1e-6), r"x \[2, 32\], weight \[16\]"),
        (lambda: layer_norm(torch.ones(2, 32), torch.ones(32), torch.ones(2), 1e-6), r"bias \[2\]"),
        (lambda: swiglu(torch.ones(2, 33)), "even row length, got 33"),
        (lambda: swiglu(torch.ones(2, 32), "cuda"), "auto, triton or eager, not 'cuda'"),
        (lambda: rope(torch.ones(3, 2, 32), torch.ones(4, 16), torch.ones(4, 16)), "shapes do not fit"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_step_of_the_model_on_triton_kernels():
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "tests.kernels.interpreted_model"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["error"] <= 1e-5, outcome["worst"]
    modules = {name.split(".")[0] for name in outcome["kernels"]}
    assert modules == {"rms_norm", "layer_norm", "swiglu", "rope", "linear_cross_entropy"}

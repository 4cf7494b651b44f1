"""The encoder's attention sums its gradients in one order where that is asked for."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eagle.model.vision_attention import DeterministicFlash, attend, choose_kernel
from megatron_eagle.runtime.determinism import set_deterministic
from tests.training.test_training_loop import train_rank, write_run


@pytest.fixture
def determinism():
    """Sets what a run sets; at the end it is off."""
    yield set_deterministic
    torch.use_deterministic_algorithms(False)


class Watched(TorchDispatchMode):
    """Writes down for each flash operator whether anything but a warning is asked of it."""

    def __init__(self):
        super().__init__()
        self.strict = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "flash_attention" in str(function):
            enabled = torch.are_deterministic_algorithms_enabled()
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            self.strict[function._schema.name.removeprefix("aten::")] = enabled and not warns
        return function(*args, **kwargs or {})


def inputs(device: str) -> list[torch.Tensor]:
    made = torch.randn(3, 2, 4, 9, 72, device=device, dtype=torch.bfloat16)
    return [x.requires_grad_() for x in made.unbind()]


@pytest.mark.parametrize("deterministic", [True, False])
def test_backward_alone_is_strict(deterministic, determinism):
    """Its operators are called on tensors without memory: what torch's signatures do not take is an error."""
    determinism(1, algorithms=deterministic)
    with Watched() as watched:
        q, k, v = inputs("meta")
        DeterministicFlash.apply(q, k, v, 0.3).sum().backward()
    assert watched.strict == {
        "_scaled_dot_product_flash_attention": False,
        "_scaled_dot_product_flash_attention_backward": deterministic,
    }
    assert [x.grad.shape for x in (q, k, v)] == [q.shape] * 3
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not deterministic or torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(
    ("dtype", "head", "capability", "kernel"),
    [
        (torch.bfloat16, 72, (9, 0), "flash"),
        (torch.float32, 72, (9, 0), "math"),
        (torch.bfloat16, 76, (9, 0), "math"),
        (torch.bfloat16, 72, (7, 5), "math"),
    ],
)
def test_which_kernel_a_gpu_takes(dtype, head, capability, kernel, determinism, monkeypatch):
    q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(2, 4, 9, head), device="cuda:0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    determinism(1)
    assert choose_kernel(q) == kernel
    determinism(1, algorithms=False)
    assert choose_kernel(q) == "any"


def test_a_cpu_computes_as_before(determinism):
    q, k, v = inputs("cpu")
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    determinism(1)
    assert torch.equal(attend(q, k, v, 0.3), plain)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_switch_reaches_the_run(deterministic, determinism, tmp_path):
    write_run(tmp_path)
    settings = [f"training.deterministic={str(deterministic).lower()}", "training.stop_at_iteration=1"]
    train_rank(str(tmp_path / "run.yaml"), 1, settings)
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_same_bits_on_a_gpu(determinism):
    """Of 64 tiles of 1,024 patches, 16 heads of 72: three times the same, and those of the plain products."""
    made = torch.randn(3, 64, 16, 1024, 72, device="cuda", dtype=torch.bfloat16)
    found = []
    for _ in range(3):
        q, k, v = (x.clone().requires_grad_() for x in made.unbind())
        determinism(1)
        assert choose_kernel(q) == "flash"
        attend(q, k, v, 72**-0.5).square().sum().backward()
        found.append([q.grad, k.grad, v.grad])
    with sdpa_kernel(SDPBackend.MATH):
        q, k, v = (x.clone().requires_grad_() for x in made[:, :2].unbind())
        F.scaled_dot_product_attention(q, k, v, scale=72**-0.5).square().sum().backward()
    for first, second, third, plain in zip(*found, [q.grad, k.grad, v.grad], strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
        torch.testing.assert_close(first[:2], plain, rtol=0.05, atol=0.05)

"""RMSNorm against Hugging Face's Qwen2: the same bits in fp32 and bf16, and a checked gradient."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from eagle_kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_qwen2_bit_for_bit(dtype):
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(96, eps=1e-6).to(dtype)
    norm.weight.data.normal_(1, 0.5)
    x = (torch.randn(7, 3, 96) * 10).to(dtype)
    assert torch.equal(rms_norm(x, norm.weight, 1e-6), norm(x))


def test_scaling_before_rounding_would_differ():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 96).bfloat16(), (torch.rand(96) + 0.5).bfloat16()
    x32 = x.float()
    other = (weight.float() * x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert not torch.equal(rms_norm(x, weight, 1e-6), other)


def test_gradient():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight), eps=1e-3, atol=1e-3)

"""Megatron's gradient norm in the form that stays on the device, against the form that it falls back to."""

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_eagle.runtime.device import Device
from megatron_eagle.runtime.megatron_cpu import use_norm_without_waiting


def test_the_norm_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (3,), (4, 5), (1,), (64, 33)
    gradients = [torch.randn(shape, generator=generator) * 10.0**n for n, shape in enumerate(shapes)]
    with Device("cpu").context():
        expected, _ = local_multi_tensor_l2_norm(0, None, [gradients], False)
        use_norm_without_waiting()
        use_norm_without_waiting()  # nothing more
        assert clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm
        norm, _ = clip_grads.l2_norm_impl(0, None, [gradients], False)
    assert norm.shape == expected.shape == (1,)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    gradients[2] += 1e4
    changed, _ = clip_grads.l2_norm_impl(0, None, [gradients], False)
    assert changed > norm

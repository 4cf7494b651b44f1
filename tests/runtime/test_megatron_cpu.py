"""The CPU context redirects while it is entered and leaves nothing behind."""

import pytest
import torch

from megatron_eagle.runtime.megatron_cpu import _patches, megatron_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


def test_redirects_and_restores():
    before = [getattr(owner, name) for owner, name, _ in _patches()]
    with megatron_on_cpu():
        assert torch.zeros(2, device="cuda").cuda().to("cuda:0").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert [getattr(owner, name) for owner, name, _ in _patches()] == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_named_random_states_are_independent():
    with megatron_on_cpu():
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        tracker = get_cuda_rng_tracker()
        tracker.add("a", 1)
        tracker.add("b", 2)
        torch.manual_seed(0)
        plain = torch.rand(1)
        torch.manual_seed(0)
        with tracker.fork("a"):
            first = torch.rand(1)
        with tracker.fork("b"):
            other = torch.rand(1)
        assert torch.equal(torch.rand(1), plain)
        with tracker.fork("a"):
            assert not torch.equal(torch.rand(1), first)
        assert not torch.equal(first, other)

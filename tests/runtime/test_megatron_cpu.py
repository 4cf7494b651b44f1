"""The CPU context redirects while it is entered and leaves nothing behind."""

import numpy as np
import pytest
import torch

from megatron_eagle.runtime.megatron_cpu import _patches, megatron_on_cpu, name_missing_router_product
from tests.parallel.harness import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")


def test_redirects_and_restores():
    before = [getattr(owner, name) for owner, name, _ in _patches()]
    with megatron_on_cpu():
        assert torch.zeros(2, device="cuda").cuda().to("cuda:0").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert [getattr(owner, name) for owner, name, _ in _patches()] == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


def test_the_routers_product_without_transformer_engine():
    from megatron.core.transformer.moe import moe_utils

    name_missing_router_product()
    name_missing_router_product()
    assert moe_utils.te_general_gemm is None


def test_sizes_of_messages_are_numpy():
    from megatron.core.transformer.moe import token_dispatcher

    sizes = torch.tensor([1, 2])
    with megatron_on_cpu():
        assert isinstance(token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True), np.ndarray)
        assert token_dispatcher.maybe_move_tensor_to_cpu(sizes) is sizes
        assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def _exchange(lengths: list[int]) -> list[torch.Tensor]:
    rank = torch.distributed.get_rank()
    parts = [torch.empty(length, 2) for length in lengths]
    torch.distributed.all_gather(parts, torch.full((lengths[rank], 2), float(rank)))
    own = torch.empty(lengths[rank], 2)
    torch.distributed.reduce_scatter(own, [part + rank for part in parts])
    return [*parts, own]


@pytest.mark.parametrize("lengths", [[3, 1], [2, 2], [0, 4]])
def test_parts_of_any_length_are_exchanged(lengths):
    for rank, (first, second, own) in enumerate(launch(_exchange, 2, lengths)):
        assert torch.equal(first, torch.zeros(lengths[0], 2))
        assert torch.equal(second, torch.ones(lengths[1], 2))
        assert torch.equal(own, torch.full((lengths[rank], 2), 2.0 * rank + 1))


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

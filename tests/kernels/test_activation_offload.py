"""Layers that wait on the host, one by one: random numbers, order of copies, slots, refusals."""

from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from eagle_kernels.activation_offload import HostStore, KeptResults, Offloaded, offloaded_layer

WIDTH = 16


def _layers(count: int, device: str = "cpu") -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(WIDTH, WIDTH).to(device) for _ in range(count)]


def _with(linear: torch.nn.Linear, log: list | None = None, name: object = None):
    """A layer with dropout and one operation that is not run again."""

    def layer(x: torch.Tensor, replay: KeptResults) -> torch.Tensor:
        if log is not None:
            log.append(("run", name))
        # Its results have no gradient here: what matters is that they are handed back.
        (scale,) = replay.once(lambda: (x.detach().abs().amax(dim=0),))
        return x + F.dropout(torch.tanh(linear(x)), 0.5) * scale

    return layer


def _gradients(linears, x, store: HostStore | None, stays: int = 0) -> list[torch.Tensor]:
    for linear in linears:
        linear.zero_grad()
    torch.manual_seed(1)
    for number, linear in enumerate(linears):
        layer = _with(linear)
        if store is None:
            x = layer(x, KeptResults())
        else:
            x = offloaded_layer(layer, x, store, stays=number >= len(linears) - stays)
    x.square().sum().backward()
    return [parameter.grad.clone() for linear in linears for parameter in linear.parameters()]


@pytest.mark.parametrize("stays", [0, 2])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_gradients_are_the_same_bits_with_dropout(stays, wants_gradient):
    linears, x = _layers(4), torch.randn(5, WIDTH, requires_grad=wants_gradient)
    expected = _gradients(linears, x, None)
    found = _gradients(linears, x, HostStore(4), stays)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_random_numbers_after_backward_are_those_without_it():
    linears, x = _layers(1), torch.randn(5, WIDTH, requires_grad=True)
    drawn = []
    for store in (None, HostStore(1)):
        _gradients(linears, x, store)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_backward_calls_the_next_tensors_back_before_it_runs_a_layer():
    log, names = [], {}
    prefetch = Offloaded.prefetch

    def record(self):
        if self._returned is None:
            log.append(("call back", names.setdefault(id(self), len(names))))
        prefetch(self)

    x, store = torch.randn(5, WIDTH, requires_grad=True), HostStore(3)
    for name, linear in enumerate(_layers(3)):
        x = offloaded_layer(_with(linear, log, name), x, store)
    log.clear()
    with patch.object(Offloaded, "prefetch", record):
        x.sum().backward()
    # Copies are named in the order of their start: 0 is the last layer's.
    order = [("call back", 0), ("call back", 1), ("run", 2), ("call back", 2), ("run", 1), ("run", 0)]
    assert log == order


def test_one_slab_serves_packs_of_any_size_and_a_larger_one_replaces_it():
    linears, store = _layers(3), HostStore(3)
    slabs = []
    empty = torch.empty

    def allocate(*shape, **options):
        if options.get("dtype") == torch.uint8:
            slabs.append(shape)
        return empty(*shape, **options)

    with patch.object(torch, "empty", allocate):
        for tokens in (8, 3, 8, 20, 8):
            x = torch.randn(tokens, WIDTH, requires_grad=True)
            assert all(
                torch.equal(a, b)
                for a, b in zip(_gradients(linears, x, store), _gradients(linears, x, None), strict=True)
            )
    assert slabs == [(3, 8 * WIDTH * 4 + WIDTH * 4), (3, 20 * WIDTH * 4 + WIDTH * 4)]
    assert len(store._free) == 3


def test_too_little_host_memory_is_said_in_one_line():
    x, store = torch.randn(5, WIDTH, requires_grad=True), HostStore(10**13)
    with pytest.raises(MemoryError, match=r"GB of host memory are not to be had: .*offload_keep_last"):
        offloaded_layer(_with(_layers(1)[0]), x, store)


def test_nothing_is_offloaded_without_gradients():
    store = HostStore(1)
    with torch.no_grad(), patch.object(HostStore, "offload", side_effect=AssertionError):
        y = offloaded_layer(_with(_layers(1)[0]), torch.randn(5, WIDTH), store)
    assert not y.requires_grad


def test_refusals():
    x, store = torch.randn(5, WIDTH, requires_grad=True), HostStore(1)
    layer = _with(_layers(1)[0])
    y = offloaded_layer(layer, x, store).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran before"):
        y.backward()
    with pytest.raises(RuntimeError, match="torch.autograd.grad is not possible here"):
        torch.autograd.grad(offloaded_layer(layer, x, store).sum(), x)
    with pytest.raises(RuntimeError, match="the results of one operation only"):
        offloaded_layer(lambda x, r: r.once(lambda: (x,))[0] + r.once(lambda: (x,))[0], x, store)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    linears = _layers(6, "cuda")
    x = torch.randn(4096, WIDTH, device="cuda", requires_grad=True)
    store = HostStore(4)
    expected = _gradients(linears, x, None)
    for _ in range(3):  # slots are used again
        found = _gradients(linears, x, store, stays=2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(slot.is_pinned() for slot in store._free) and len(store._free) == 4

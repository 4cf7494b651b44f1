"""The chunked output layer and loss, eager, against plain torch in fp64; what it refuses."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from eagle_kernels.linear_cross_entropy import linear_cross_entropy

N, WIDTH, ROWS, VOCAB = 50, 32, 112, 101


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(ROWS, WIDTH, generator=generator) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (N,), generator=generator)
    token_weights = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) < 0.4) / 10
    labels[token_weights == 0] = -100
    return x, weight, labels, token_weights


def _exact(x, weight, labels, token_weights) -> tuple[torch.Tensor, ...]:
    """Losses and gradients of plain torch in fp64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = F.linear(x, weight)[:, :VOCAB]
    losses = F.cross_entropy(logits, labels, reduction="none")
    losses = losses * (token_weights > 0)
    torch.dot(losses, token_weights.double()).backward()
    return losses, x.grad, weight.grad


def _off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("chunk_size", [1, 7, 4096])
def test_equals_plain_torch(chunk_size):
    x, weight, labels, token_weights = _inputs()
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB, chunk_size=chunk_size)
    torch.dot(losses, token_weights).backward()
    for actual, exact in zip((losses, x.grad, weight.grad), _exact(*_inputs()), strict=True):
        assert _off(actual, exact) < 1e-6
    assert weight.grad[VOCAB:].eq(0).all()


def test_bf16_weight_gradients_are_summed_in_fp32():
    """Chunks of one token, hundreds of sums: no more error than that of the rounded products."""
    x, weight, labels, token_weights = _inputs(torch.bfloat16)
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB, chunk_size=1)
    torch.dot(losses, token_weights).backward()
    _, grad_x, grad_weight = _exact(*_inputs(torch.bfloat16))
    assert weight.grad.dtype == torch.bfloat16
    assert _off(weight.grad, grad_weight) < 5e-3 and _off(x.grad, grad_x) < 1e-2


def test_a_multiple_of_the_loss_scales_the_gradients():
    x, weight, labels, token_weights = _inputs()
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB)
    (3 * torch.dot(losses, token_weights)).backward()
    _, grad_x, grad_weight = _exact(*_inputs())
    assert _off(x.grad, 3 * grad_x) < 1e-6 and _off(weight.grad, 3 * grad_weight) < 1e-6


def test_another_loss_than_the_announced_is_refused():
    losses = linear_cross_entropy(*_inputs(), vocab_size=VOCAB)
    with pytest.raises(RuntimeError, match="must be summed with the token_weights that it was given"):
        losses.mean().backward()


@pytest.mark.parametrize(("off", "refused"), [(6e-5, False), (1.5e-4, True)])
def test_rounding_of_the_announced_loss_is_let_pass(off, refused):
    """Up to 1e-4 of the largest, whatever the loss is scaled by."""
    x, weight, labels, token_weights = _inputs()
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB)
    gradient = 3 * token_weights
    gradient[token_weights.argmin()] += off * gradient.max()
    with pytest.raises(RuntimeError, match="must be summed") if refused else nullcontext():
        losses.backward(gradient)


def test_no_supervised_token():
    x, weight, labels, token_weights = _inputs()
    losses = linear_cross_entropy(x, weight, labels, token_weights * 0, vocab_size=VOCAB)
    torch.dot(losses, token_weights * 0).backward()
    assert not losses.any() and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen):
    x, weight, labels, token_weights = _inputs()
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB)
    torch.dot(losses, token_weights).backward()
    _, grad_x, grad_weight = _exact(*_inputs())
    if frozen == "x":
        assert x.grad is None and _off(weight.grad, grad_weight) < 1e-6
    else:
        assert weight.grad is None and _off(x.grad, grad_x) < 1e-6


def test_without_gradients_only_the_loss():
    x, weight, labels, token_weights = _inputs()
    with torch.no_grad():
        losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB)
    assert not losses.requires_grad and _off(losses, _exact(*_inputs())[0]) < 1e-6


def test_gradient_goes_straight_into_main_grad():
    x, weight, labels, token_weights = _inputs()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(ROWS, WIDTH), False
    for _ in range(2):  # microbatches
        losses = linear_cross_entropy(
            x, weight, labels, token_weights, vocab_size=VOCAB, into_main_grad=True, chunk_size=9
        )
        torch.dot(losses, token_weights).backward()
    assert weight.grad_added_to_main_grad
    assert _off(weight.main_grad, 1 + 2 * _exact(*_inputs())[2]) < 1e-6
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB, into_main_grad=True)
    with pytest.raises(RuntimeError, match="not scaled after the sum"):
        (2 * torch.dot(losses, token_weights)).backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_reach_their_token_and_the_weight(value):
    x, weight, labels, token_weights = _inputs()
    bad = int(token_weights.nonzero()[3])
    with torch.no_grad():
        x[bad, 0] = value
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB, chunk_size=5)
    torch.dot(losses, token_weights).backward()
    assert (~losses.isfinite()).nonzero().flatten().tolist() == [bad]
    assert x.grad.isnan().any(1).nonzero().flatten().tolist() == [bad] and weight.grad.isnan().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.full((N,), VOCAB)}, r": 19 supervised labels are outside 0..100, the first is 101"),
        ({"labels": torch.zeros(N - 1).long()}, r"labels \[49\], token_weights \[50\] for 50 tokens"),
        ({"labels": torch.zeros(N, dtype=torch.int32)}, "labels torch.int32"),
        ({"x": torch.ones(N, WIDTH + 1)}, r"x \[50, 33\] does not fit weight \[112, 32\]"),
        ({"x": torch.ones(N, WIDTH).bfloat16()}, "weight is torch.float32 on cpu, x is torch.bfloat16"),
        ({"into_main_grad": True}, "needs weight.main_grad in fp32"),
    ],
)
def test_refusals(changes, message):
    inputs = dict(zip(("x", "weight", "labels", "token_weights"), _inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(inputs | changes), vocab_size=VOCAB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    x, weight, labels, token_weights = (t.detach().cuda() for t in _inputs(dtype))
    x.requires_grad_(), weight.requires_grad_()
    losses = linear_cross_entropy(x, weight, labels, token_weights, vocab_size=VOCAB, chunk_size=16)
    torch.dot(losses, token_weights).backward()
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for actual, exact in zip((losses, x.grad, weight.grad), _exact(*_inputs(dtype)), strict=True):
        assert _off(actual.cpu(), exact) < limit

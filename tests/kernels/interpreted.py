"""Every Triton kernel in the interpreter against fp64: `python -m tests.kernels.interpreted`.

Prints JSON: per check, the largest error of each output and gradient relative to the largest reference value.
A process of its own with TRITON_INTERPRET=1, because triton reads TRITON_INTERPRET once, when it is imported.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_kernels.layer_norm import layer_norm
from eagle_kernels.linear_cross_entropy import linear_cross_entropy
from eagle_kernels.rms_norm import rms_norm
from eagle_kernels.rope import inverse_frequencies, rope, rotary_table
from eagle_kernels.swiglu import forget_product, swiglu

LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2}


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def compare(function: Callable, reference: Callable, *inputs: Tensor) -> float:
    """Output and gradients of `function` against `reference` in fp64 -> the worst error."""
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, expected = function(*ours), reference(*exact)
    grad = torch.randn_like(got)
    actual = torch.autograd.grad(got, ours, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    return max(_error(got, expected), *(_error(a, w) for a, w in zip(actual, wanted, strict=True)))


def _rms64(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def check_rms_norm(dtype: torch.dtype) -> dict[str, float]:
    """Odd row counts and widths, rows that are not adjacent."""
    weight = (1 + 0.1 * torch.randn(144)).to(dtype)
    x, wide = torch.randn(37, 144).to(dtype), torch.randn(5, 3, 400).to(dtype)
    return {
        "rows": compare(lambda x, w: rms_norm(x, w, 1e-6, "triton"), _rms64, x, weight),
        "strided": compare(
            lambda x, w: rms_norm(x[..., 16:160], w, 1e-6, "triton"),
            lambda x, w: _rms64(x[..., 16:160], w),
            wide,
            weight,
        ),
    }


def check_rms_norm_rounding(dtype: torch.dtype) -> dict[str, float]:
    """Triton and the eager twin round in the same order: in bf16 hardly an element differs at all."""
    weight, x = (1 + 0.1 * torch.randn(512)).to(dtype), torch.randn(64, 512).to(dtype)
    eager, kernel = (rms_norm(x, weight, 1e-6, name) for name in ("eager", "triton"))
    differing = (kernel != eager).double().mean().item()
    errors = {"rows": _error(kernel, eager.double())}
    return errors | ({"share of other bits": differing} if dtype == torch.bfloat16 else {})


def check_layer_norm(dtype: torch.dtype) -> dict[str, float]:
    """Odd row counts, and rows far from zero, where one-pass variance would cancel."""
    weight, bias = (1 + 0.1 * torch.randn(144)).to(dtype), torch.randn(144).to(dtype)
    reference = lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6)  # noqa: E731
    ours = lambda x, w, b: layer_norm(x, w, b, 1e-6, "triton")  # noqa: E731
    near, far = torch.randn(37, 144), torch.randn(9, 144) + 20
    return {
        "rows": compare(ours, reference, near.to(dtype), weight, bias),
        "far": compare(ours, reference, far.to(dtype), weight, bias),
    }


def check_swiglu(dtype: torch.dtype) -> dict[str, float]:
    """More than one block of columns, and a gradient written over its input."""
    reference = lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]  # noqa: E731
    x = torch.randn(7, 2 * 1040).to(dtype)
    scratch = x.clone().requires_grad_()
    overwritten = swiglu(scratch * 1, "triton", reuse_input=True)
    grad = torch.randn_like(overwritten)
    exact = x.double().requires_grad_()
    down = torch.randn(16, 1040).to(dtype) / 32

    def forgetful(x: Tensor, down: Tensor) -> Tensor:
        gate_up = x * 1
        y = swiglu(gate_up, "triton", reuse_input=True)
        with forget_product(y, gate_up, "triton"):
            return F.linear(y, down)

    return {
        "product computed again": compare(forgetful, lambda x, down: F.linear(reference(x), down), x, down),
        "blocks": compare(lambda x: swiglu(x, "triton"), reference, x),
        "strided": compare(
            lambda x: swiglu(x[:, ::2, :], "triton"), lambda x: reference(x[:, ::2, :]), x.view(1, 7, -1)
        ),
        "in place": _error(
            torch.autograd.grad(overwritten, scratch, grad)[0],
            torch.autograd.grad(reference(exact), exact, grad.double())[0],
        ),
    }


def check_rope(dtype: torch.dtype) -> dict[str, float]:
    """Positions far out, head counts that fill no block, a slice of a packed projection; every rounding."""
    positions = torch.tensor([0, 1, 2, 0, 1, 131071, 77, 5, 5])
    cos, sin = rotary_table(positions, inverse_frequencies(64, 1e6))

    def reference(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

    packed, heads = torch.randn(9, 5, 192).to(dtype), torch.randn(9, 7, 64).to(dtype)
    eager, kernel = (rope(heads, cos, sin, name) for name in ("eager", "triton"))
    return {
        "other bits than the eager twin": (eager != kernel).sum().item(),
        "heads": compare(lambda x: rope(x, cos, sin, "triton"), reference, heads),
        "slice": compare(
            lambda x: rope(x[..., 64:128], cos, sin, "triton"), lambda x: reference(x[..., 64:128]), packed
        ),
    }


def check_bad_values(dtype: torch.dtype) -> dict[str, float]:
    """NaN and infinity reach exactly the rows that hold them."""
    x, weight = torch.randn(6, 64).to(dtype), torch.ones(64, dtype=dtype)
    x[1, 3], x[4, 5] = float("nan"), float("inf")
    expected = torch.tensor([True, False, True, True, False, True])
    outputs = {
        "rms_norm": rms_norm(x, weight, 1e-6, "triton"),
        "layer_norm": layer_norm(x, weight, weight, 1e-6, "triton"),
        "swiglu": swiglu(x.repeat(1, 2), "triton"),
        "linear_cross_entropy": linear_cross_entropy(
            x, torch.ones(32, 64, dtype=dtype), torch.zeros(6).long(), torch.ones(6), implementation="triton"
        )[:, None],
    }
    return {name: float((y.isfinite().all(-1) != expected).sum()) for name, y in outputs.items()}


def check_linear_cross_entropy(dtype: torch.dtype) -> dict[str, float]:
    """Padding rows, unsupervised tokens with labels that are none, chunks that do not divide, more rows than
    a block; one supervised token and none."""
    n, n_rows, vocab_size = 11, 4224, 4203
    x, weight = torch.randn(n, 48).to(dtype), (torch.randn(n_rows, 48) * 0.3).to(dtype)
    labels, token_weights = torch.randint(vocab_size, (n,)), torch.rand(n)
    labels[3], token_weights[3] = -100, 0
    labels[0] = vocab_size - 1
    errors = {}
    for name, kept in (
        ("many", token_weights),
        ("one", token_weights * (torch.arange(n) == 5)),
        ("none", None),
    ):
        weights = torch.zeros(n) if kept is None else kept

        def reference(x: Tensor, weight: Tensor, weights: Tensor = weights) -> Tensor:
            logits = (x @ weight.t())[:, :vocab_size]
            lse = logits.logsumexp(-1)
            loss = lse - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            return loss * (weights > 0)

        ours = [t.detach().requires_grad_() for t in (x, weight)]
        exact = [t.detach().double().requires_grad_() for t in (x, weight)]
        options = {"vocab_size": vocab_size, "chunk_size": 4, "implementation": "triton"}
        losses, expected = linear_cross_entropy(*ours, labels, weights, **options), reference(*exact)
        torch.dot(losses, weights).backward()
        torch.dot(expected, weights.double()).backward()
        if kept is None:
            errors[name] = max(losses.abs().max().item(), *(t.grad.abs().max().item() for t in ours))
            continue
        errors[f"{name}, loss"] = _error(losses, expected)
        for what, a, e in zip(("x", "weight"), ours, exact, strict=True):
            errors[f"{name}, {what}"] = _error(a.grad, e.grad)
        errors[f"{name}, padding rows"] = ours[1].grad[vocab_size:].abs().max().item()
    return errors


def check_liger(dtype: torch.dtype) -> dict[str, float]:
    """The loss and its gradient beside Liger's cross-entropy on the same logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    n, n_rows = 128, 4096
    x, weight = torch.randn(n, 32).to(dtype), (torch.randn(n_rows, 32) * 0.3).to(dtype)
    labels, token_weights = torch.randint(n_rows, (n,)), torch.full((n,), 1 / n)
    labels[::3], token_weights[::3] = -100, 0
    token_weights /= token_weights.sum()
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    losses = linear_cross_entropy(*ours, labels, token_weights, chunk_size=50, implementation="triton")
    loss = torch.dot(losses, token_weights)
    logits = F.linear(*theirs)
    expected = LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "mean")[0]
    found = {"loss": _error(loss, expected.double())}
    loss.backward(), expected.backward()
    for name, a, b in zip(("x", "weight"), ours, theirs, strict=True):
        found[name] = _error(a.grad, b.grad.double())
    return found


def check_refusals(dtype: torch.dtype) -> dict[str, float]:
    """Shapes that only the Triton kernels refuse; 0 where the message is the one expected."""
    ones = partial(torch.ones, dtype=dtype)
    labels, weights, other = torch.zeros(2).long(), torch.ones(2), ones(40).double()
    fused = partial(linear_cross_entropy, implementation="triton")
    calls = {
        "rms_norm: the row length must be a multiple of 16 .* got 40": lambda: rms_norm(
            ones(2, 40), ones(40), 1e-6, "triton"
        ),
        "layer_norm: the row length .* got 40": lambda: layer_norm(
            ones(2, 40), ones(40), ones(40), 1e-6, "triton"
        ),
        "swiglu: the row length .* got 40": lambda: swiglu(ones(2, 80), "triton"),
        "rope: half of the head size must be a power of two for Triton, got 48": lambda: rope(
            ones(3, 2, 96), ones(3, 48), ones(3, 48), "triton"
        ),
        "rows of the weight: the row length .* got 40": lambda: fused(
            ones(2, 16), ones(40, 16), labels, weights
        ),
        "rms_norm: weight is torch.float64 on .*, x is": lambda: rms_norm(ones(2, 40), other, 1e-6, "triton"),
    }
    found = {}
    for message, call in calls.items():
        try:
            call()
            found[message] = 1.0
        except ValueError as error:
            found[message] = float(re.search(message, str(error)) is None)
    return found


CHECKS = [
    check_rms_norm,
    check_rms_norm_rounding,
    check_layer_norm,
    check_swiglu,
    check_rope,
    check_linear_cross_entropy,
    check_bad_values,
    check_liger,
    check_refusals,
]


def main() -> None:
    """Run all checks in both types."""
    from eagle_kernels.dispatch import is_interpreted
    from tests.kernels.interpreter_bf16 import repair

    assert is_interpreted(), "set TRITON_INTERPRET=1"
    repair()
    torch.set_num_threads(1)
    results = {}
    for dtype in LIMITS:
        for check in CHECKS:
            if check is check_liger and find_spec("liger_kernel") is None:
                continue
            torch.manual_seed(0)
            results[f"{check.__name__} {dtype}"] = check(dtype)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

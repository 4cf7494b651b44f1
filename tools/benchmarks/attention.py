"""Core attention on a GPU: forward and backward of every backend beside its kernels called directly.

One rank's share under context parallel size 8 and the default layout: its queries of one document against all
keys that they see, bf16, 28 query and 4 KV heads of 128, deterministic. Backends are called as in
training, one KV head and its queries at a time; kernels directly, all heads in one call. torch's
`scaled_dot_product_attention` has no such shape: it is given one causal square of as many pairs.

FLOPs are those of the pairs that causality leaves: 4 x 128 a pair and query head forward, 10 x 128 backward
(its fifth product computes the scores again). `off` is the largest relative distance of output, dQ, dK or dV
from those of the first backend.
"""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from benchmarks.report import Report, progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_eagle.context_parallel.attention_backend import AttentionBackend
from megatron_eagle.context_parallel.backends import FAST, why_not_backend
from megatron_eagle.context_parallel.exchange import plan_exchange
from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.planning import plan_layout
from megatron_eagle.context_parallel.varlen import varlen_shape
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import pair_costs
from megatron_eagle.model.presets import preset

LENGTHS, SIZE = (8192, 32768, 131072), 8
QUERY_HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128
SCALE = HEAD_DIM**-0.5
COSTS = pair_costs(preset("eagle2.5-8b").complete())
WARM_UP, REPEATS = 3, 10

# The output, and a function that gives dQ, dK and dV.
Pass = Callable[[], tuple[Tensor, Callable[[], tuple[Tensor, ...]]]]


def share(length: int) -> tuple[tuple[Segment, ...], int]:
    """Segments of the first rank's queries, and how many pairs of a query and a key they have."""
    layout = plan_layout("balanced", length, SIZE, [0, length], costs=COSTS)
    segments = plan_exchange(layout, 0, [0, length], "gather").segments
    pairs = 0
    for part in segments:
        rows, keys = part.q_end - part.q_start, part.k_end - part.k_start
        pairs += rows * keys - rows * (rows - 1) // 2
    return segments, pairs


class Task:
    """Seeded tensors of one rank."""

    def __init__(self, length: int, device: str = "cuda") -> None:
        self.segments, self.pairs = share(length)
        torch.manual_seed(0)
        rows, keys = self.segments[-1].q_end, self.segments[-1].k_end
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.q, self.grad = (torch.randn(rows, QUERY_HEADS, HEAD_DIM, **options) for _ in range(2))
        self.k, self.v = (torch.randn(keys, KEY_HEADS, HEAD_DIM, **options) for _ in range(2))

    def by_backend(self, backend: AttentionBackend) -> Pass:
        """As `GatherKVAttention` calls it, without the exchange."""
        each = QUERY_HEADS // KEY_HEADS
        keys = [
            (self.k[:, h : h + 1].contiguous(), self.v[:, h : h + 1].contiguous()) for h in range(KEY_HEADS)
        ]
        heads = [slice(h * each, (h + 1) * each) for h in range(KEY_HEADS)]

        def run() -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
            results = [
                backend.forward(self.q[:, own], k, v, self.segments, SCALE, causal=True)
                for own, (k, v) in zip(heads, keys, strict=True)
            ]
            out, lse = torch.cat([out for out, _ in results], dim=1), torch.cat([lse for _, lse in results])

            def backward() -> tuple[Tensor, ...]:
                grads = [
                    backend.backward(
                        self.grad[:, own],
                        self.q[:, own],
                        k,
                        v,
                        out[:, own],
                        lse[own],
                        self.segments,
                        SCALE,
                        causal=True,
                    )
                    for own, (k, v) in zip(heads, keys, strict=True)
                ]
                return tuple(torch.cat(parts, dim=1) for parts in zip(*grads, strict=True))

            return out, backward

        return run

    def by_autograd(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Pass:
        """A kernel behind its own public function."""
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        return _differentiated(function, leaves, self.grad)

    def as_square(self, kernel: SDPBackend) -> Pass:
        """torch's attention over one causal square of as many pairs."""
        side = math.isqrt(2 * self.pairs)
        leaves = [
            torch.randn(1, heads, side, HEAD_DIM, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
        ]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return _differentiated(attend, leaves, torch.randn_like(leaves[0]))


def _differentiated(function: Callable[..., Any], leaves: list[Tensor], grad: Tensor) -> Pass:
    def run() -> tuple[Tensor, Callable[[], tuple[Tensor, ...]]]:
        out = function(*leaves)
        return out.detach(), lambda: torch.autograd.grad(out, leaves, grad)

    return run


def contestants(task: Task) -> dict[str, Pass]:
    """What can run here; the others are named on standard error with the reason."""
    found = {}
    for name, backend in FAST.items():
        if missing := why_not_backend(name, torch.bfloat16, HEAD_DIM):
            progress(f"  {name}: left out, {missing}")
            continue
        found[name] = task.by_backend(backend())
    lengths = varlen_shape(task.segments, task.q.device)
    settings = {"softmax_scale": SCALE, "causal": True, "deterministic": True}
    if "flash3" in found:
        from flash_attn_interface import flash_attn_varlen_func as flash_attention_3

        found["flash3, direct"] = task.by_autograd(
            lambda q, k, v: _output(flash_attention_3(q, k, v, *lengths, **settings))
        )
    if "flash" in found:
        from flash_attn import flash_attn_varlen_func

        found["flash, direct"] = task.by_autograd(
            lambda q, k, v: flash_attn_varlen_func(q, k, v, *lengths, **settings)
        )
    found["SDPA flash, square"] = task.as_square(SDPBackend.FLASH_ATTENTION)
    found["SDPA cuDNN, square"] = task.as_square(SDPBackend.CUDNN_ATTENTION)
    return found


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions of FlashAttention 3 give the log-sum-exp beside the output."""
    return result[0] if isinstance(result, tuple) else result


def _milliseconds(run: Pass) -> tuple[float, float]:
    """Of one forward and of one backward."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    marks[0].record()
    _, backward = run()
    marks[1].record()
    backward()
    marks[2].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])


def measure(length: int) -> list[dict[str, Any]]:
    """One row per contestant, which take turns."""
    task = Task(length)
    times: dict[str, list[tuple[float, float]]] = {}
    runs, off, first = contestants(task), {}, None
    for name, run in runs.items():
        try:
            out, backward = run()
            results = [out, *backward()]
            for _ in range(WARM_UP - 1):
                _milliseconds(run)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            progress(f"  {name}: {str(error).splitlines()[0]}")
            continue
        times[name] = []
        if "square" not in name:
            first = first or results
            off[name] = max(
                ((a.float() - b.float()).norm() / b.float().norm()).item()
                for a, b in zip(results, first, strict=True)
            )
    for _ in range(REPEATS):
        for name, measured in times.items():
            measured.append(_milliseconds(runs[name]))
    return [_row(length, name, task.pairs, times.get(name), off.get(name)) for name in runs]


def _row(
    length: int, name: str, pairs: int, times: list[tuple[float, float]] | None, off: float | None
) -> dict[str, str | int | float]:
    forward: str | float = "failed"
    backward: str | float = "failed"
    both: str | float = "failed"
    rate: str | float = "failed"
    if times is not None:
        forward, backward = (median(part) for part in zip(*times, strict=True))
        whole = median(map(sum, times))
        both, rate = whole, 14 * pairs * HEAD_DIM * QUERY_HEADS / whole / 1e9
    return {
        "tokens": length,
        "attention": name,
        "forward ms": forward,
        "backward ms": backward,
        "both ms": both,
        "TFLOP/s": rate,
        "off": "-" if off is None else off,
    }


def run() -> Report:
    """Every length and contestant.

    Raises:
        UserError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError("bench.py attention measures GPU kernels and there is no CUDA device here")
    torch.use_deterministic_algorithms(True)
    rows = []
    for length in LENGTHS:
        progress(f"{length:,} tokens")
        rows += measure(length)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return Report(f"Core attention, one rank of {SIZE}, {where}; medians of {REPEATS}", rows)

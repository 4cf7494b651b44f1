"""Output layer with cross-entropy, forward and backward on a CPU in fp32: peak memory and time beside peers.

Peak memory is the largest running sum of torch.profiler's memory events, without inputs. `formula` is what
`eagle_kernels.linear_cross_entropy` states; it is checked within 10 % by tests/kernels.
Liger's and Cut cross-entropy's kernels need a GPU and are not here.
"""

import time
from collections.abc import Callable

import torch
from benchmarks.report import Report, progress
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from eagle_kernels.linear_cross_entropy import CHUNK, linear_cross_entropy
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel

WIDTH = 256
_MEASURED = "measured"


class Task:
    """Seeded inputs: `supervised` of `tokens` carry a weight."""

    def __init__(self, tokens: int, rows: int, supervised: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
        self.weight = torch.randn(rows, WIDTH, generator=generator).mul_(0.05).requires_grad_()
        self.weight.main_grad = torch.zeros(rows, WIDTH)
        self.labels = torch.randint(rows, (tokens,), generator=generator)
        self.token_weights = torch.zeros(tokens)
        places = torch.randperm(tokens, generator=generator)[:supervised]
        self.token_weights[places] = torch.rand(supervised, generator=generator) / supervised

    def step(self, losses: Callable[["Task"], Tensor]) -> tuple[Tensor, ...]:
        """Forward and backward -> loss, gradients of x and of the weight."""
        self.x.grad = self.weight.grad = None
        loss = torch.dot(losses(self), self.token_weights)
        loss.backward()
        return loss.detach(), self.x.grad, self.weight.grad


def fused(task: Task) -> Tensor:
    """This project's."""
    return linear_cross_entropy(task.x, task.weight, task.labels, task.token_weights)


def fused_into_main_grad(task: Task) -> Tensor:
    """This project's, with the weight's gradient added to the buffer that training has anyway."""
    return linear_cross_entropy(task.x, task.weight, task.labels, task.token_weights, into_main_grad=True)


def plain(task: Task) -> Tensor:
    """Plain torch: all logits, then the cross-entropy."""
    return F.cross_entropy(F.linear(task.x, task.weight), task.labels, reduction="none")


def megatron(task: Task) -> Tensor:
    """Plain logits, then Megatron-Core's vocabulary parallel cross-entropy, on one rank."""
    logits = F.linear(task.x, task.weight)[:, None]
    return vocab_parallel_cross_entropy(logits, task.labels[:, None]).view(-1)


CONTESTANTS = {
    "fused": fused,
    "fused, main_grad": fused_into_main_grad,
    "Megatron-Core": megatron,
    "plain torch": plain,
}


def formula(tokens: int, rows: int, supervised: int, into_main_grad: bool) -> int:
    """Bytes of the fused loss in fp32: gradients of x (compact, and in backward whole) and of the weight, and
    one chunk's logits and inputs."""
    chunk = min(CHUNK, supervised)
    compact, whole, weight = supervised * WIDTH, tokens * WIDTH, rows * WIDTH
    dummy = weight if into_main_grad else 0
    total = 0 if into_main_grad else weight
    forward = compact + total + chunk * (rows + WIDTH)
    return 4 * max(forward, compact + whole + total + dummy)


def peak_bytes(step: Callable[[], object]) -> int:
    """Largest number of bytes held during `step` beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        with record_function(_MEASURED):
            kept = step()
        del kept
    events = profiler.profiler.kineto_results.events()
    (measured,) = [event for event in events if event.name() == _MEASURED]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for moment, change in changes:
        if measured.start_ns() <= moment <= measured.end_ns():
            held += change
            peak = max(peak, held)
    return peak


def measure(tokens: int, rows: int, supervised: int) -> list[dict]:
    """One row per contestant, all on the same inputs; call inside `model_parallel`."""
    task = Task(tokens, rows, supervised)
    reference, found = task.step(plain), []
    for name, losses in CONTESTANTS.items():
        loss, grad_x, _ = task.step(losses)
        apart = ((grad_x - reference[1]).norm() / reference[1].norm()).item()
        start = time.process_time()
        task.step(losses)
        seconds = time.process_time() - start
        task.x.grad = task.weight.grad = None
        peak = peak_bytes(lambda losses=losses: task.step(losses))
        fused_row = name.startswith("fused")
        expected = formula(tokens, rows, supervised, name != "fused") if fused_row else 0
        found.append(
            {
                "tokens": tokens,
                "rows": rows,
                "supervised": supervised,
                "loss": name,
                "peak MB": peak / 1e6,
                "formula MB": expected / 1e6 if fused_row else "-",
                "CPU s": seconds,
                "dx off": apart,
                "value off": abs((loss - reference[0]) / reference[0]).item(),
            }
        )
    plain_peak = found[-1]["peak MB"]
    return [row | {"x plain": row["peak MB"] / plain_peak} for row in found]


def run(large: bool = False) -> Report:
    """Growth in tokens, at the largest also with 15 % supervised; `large`: more tokens, and more rows."""
    torch.set_num_threads(1)
    sizes = [(2048, 16384, 2048), (4096, 16384, 4096), (8192, 16384, 8192), (8192, 16384, 1229)]
    if large:
        sizes += [(16384, 16384, 16384), (4096, 65536, 4096)]
    device, rows = detect_device(), []
    with device.context(), process_group(device), model_parallel(ParallelConfig()):
        for tokens, vocabulary, supervised in sizes:
            progress(f"{tokens:,} tokens, {supervised:,} supervised, {vocabulary:,} rows")
            rows += measure(tokens, vocabulary, supervised)
    title = (
        f"fp32, one CPU thread, width {WIDTH}, chunks of {CHUNK}; peak beyond inputs, time after a warm-up"
    )
    return Report(title, rows, "--large" * large)

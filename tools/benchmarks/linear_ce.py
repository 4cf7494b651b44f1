"""Output layer with cross-entropy, forward and backward: peak memory and time beside peers.

On a CPU in fp32, small; on a GPU in bf16 at Eagle2.5-8B's sizes, beside Liger and the matrix products alone.
`formula` is what `eagle_kernels.linear_cross_entropy` states; on a CPU tests/kernels check it within 10 %.
Liger's fused loss needs a GPU (its cross-entropy kernel alone is compared in Triton's interpreter, in tests).
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.measuring import peak_bytes, seconds
from benchmarks.report import Report, progress
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn import functional as F

from eagle_kernels.linear_cross_entropy import CHUNK, linear_cross_entropy
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel

WIDTH = {"cpu": 256, "cuda": 3584}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


class Task:
    """Seeded inputs: `supervised` of `tokens` carry a weight."""

    def __init__(self, tokens: int, rows: int, supervised: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        width = WIDTH[device]
        options: dict[str, Any] = {"generator": generator, "device": device}
        self.device = device
        self.x = torch.randn(tokens, width, **options).to(DTYPE[device]).requires_grad_()
        weight: Any = torch.randn(rows, width, **options).mul_(0.05).to(DTYPE[device]).requires_grad_()
        weight.main_grad = torch.zeros(rows, width, device=device)
        self.weight: Any = weight
        self.labels = torch.randint(rows, (tokens,), **options)
        self.token_weights = torch.zeros(tokens, device=device)
        places = torch.randperm(tokens, **options)[:supervised]
        self.token_weights[places] = torch.rand(supervised, **options) / supervised

    def step(self, losses: Callable[["Task"], Tensor]) -> tuple[Tensor, ...]:
        """Forward and backward -> loss, gradients of x and of the weight."""
        self.x.grad = self.weight.grad = None
        loss = losses(self)
        loss = torch.dot(loss, self.token_weights) if loss.dim() else loss
        loss.backward()
        x_grad, weight_grad = self.x.grad, self.weight.grad
        assert x_grad is not None and weight_grad is not None, "backward ran"
        return loss.detach(), x_grad, weight_grad


def fused(task: Task) -> Tensor:
    """This project's."""
    return linear_cross_entropy(task.x, task.weight, task.labels, task.token_weights)


def fused_into_main_grad(task: Task) -> Tensor:
    """This project's, with the weight's gradient added to the buffer that training has anyway."""
    return linear_cross_entropy(task.x, task.weight, task.labels, task.token_weights, into_main_grad=True)


def plain(task: Task) -> Tensor:
    """Plain torch: all logits, then the cross-entropy in fp32."""
    return F.cross_entropy(F.linear(task.x, task.weight).float(), task.labels, reduction="none")


def megatron(task: Task) -> Tensor:
    """Plain logits, then Megatron-Core's vocabulary parallel cross-entropy, on one rank."""
    logits = F.linear(task.x, task.weight)[:, None]
    losses: Tensor = vocab_parallel_cross_entropy(logits, task.labels[:, None])
    return losses.view(-1)


def liger(task: Task) -> Tensor:
    """Liger's fused loss with fp32 accumulation. It weighs no tokens: the mean over the supervised ones."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    labels = torch.where(task.token_weights > 0, task.labels, -100)
    losses: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
        task.x, task.weight, labels, None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32
    )[0]
    return losses


CONTESTANTS: dict[str, Callable[[Task], Tensor]] = {
    "fused": fused,
    "fused, main_grad": fused_into_main_grad,
    "Megatron-Core": megatron,
}


def contestants(device: str) -> dict[str, Callable[[Task], Tensor]]:
    """What runs on `device`; plain torch, the yardstick, last."""
    own: dict[str, Callable[[Task], Tensor]] = (
        {"Liger": liger} if device == "cuda" and find_spec("liger_kernel") else {}
    )
    return CONTESTANTS | own | {"plain torch": plain}


def formula(tokens: int, rows: int, supervised: int, into_main_grad: bool, device: str = "cpu") -> int:
    """Bytes of the fused loss: gradients of x (compact, and in backward whole) and of the weight, and one
    chunk's logits and inputs."""
    e, width, chunk = DTYPE[device].itemsize, WIDTH[device], min(CHUNK, supervised)
    compact, whole, weight = supervised * width * e, tokens * width * e, rows * width * e
    total = 0 if into_main_grad else 4 * rows * width
    own_type = weight if into_main_grad or e < 4 else 0
    return max(compact + total + chunk * (rows + width) * e, compact + whole + total + own_type)


def products(task: Task) -> Callable[[], None]:
    """The three matrix products of the supervised tokens alone, chunk by chunk, the last summed in fp32."""
    x = task.x.detach()[task.token_weights.nonzero().squeeze(1)]
    weight, total = task.weight.detach(), torch.zeros_like(task.weight.main_grad)

    def run() -> None:
        for chunk in x.split(CHUNK):
            logits = chunk @ weight.t()
            logits @ weight
            torch.addmm(total, logits.t(), chunk, out_dtype=torch.float32, out=total)

    return run


def measure(tokens: int, rows: int, supervised: int, device: str = "cpu") -> list[dict[str, Any]]:
    """One row per contestant, all on the same inputs; call inside `model_parallel`."""
    task, found = Task(tokens, rows, supervised, device), []
    shape = {"tokens": tokens, "rows": rows, "supervised": supervised}
    reference = task.step(fused if device == "cuda" else plain)
    for name, losses in contestants(device).items():
        fused_row = name.startswith("fused")
        expected = formula(tokens, rows, supervised, name != "fused", device) if fused_row else 0
        row: dict[str, Any] = shape | {
            "loss": name,
            "peak MB": "-",
            "formula MB": expected / 1e6 if fused_row else "-",
        }
        try:
            loss, grad_x, _ = task.step(losses)
            taken = seconds(partial(task.step, losses), device, 1 if device == "cpu" else 5)
            task.x.grad = task.weight.grad = None
            row["peak MB"] = peak_bytes(partial(task.step, losses), device) / 1e6
        except torch.OutOfMemoryError:
            found.append(row | {"seconds": "out of memory", "dx off": "-", "value off": "-"})
            continue
        apart: str | float = "-"
        value: str | float = "-"
        if name != "Liger":  # it has another weighting
            apart = ((grad_x - reference[1]).norm() / reference[1].norm()).item()
            value = abs((loss - reference[0]) / reference[0]).item()
        found.append(row | {"seconds": taken, "dx off": apart, "value off": value})
    if device == "cuda":
        taken = seconds(products(task), device, 5)
        found = [row | {"x products": _ratio(row["seconds"], taken)} for row in found]
    plain_peak = found[-1]["peak MB"]
    return [row | {"x plain": _ratio(row["peak MB"], plain_peak)} for row in found]


def _ratio(value: float | str, other: float | str) -> float | str:
    return "-" if isinstance(value, str) or isinstance(other, str) else value / other


def run(large: bool = False, device: str = "cpu") -> Report:
    """Growth in tokens, at the largest also with 15 % supervised; `large`: more tokens, and more rows."""
    torch.set_num_threads(1)
    if device == "cuda":
        sizes = [(n, 152064, round(n * share)) for n in (8192, 32768, 131072) for share in (1, 0.15)]
    else:
        sizes = [(2048, 16384, 2048), (4096, 16384, 4096), (8192, 16384, 8192), (8192, 16384, 1229)]
        if large:
            sizes += [(16384, 16384, 16384), (4096, 65536, 4096)]
    here, rows = detect_device(), []
    with here.context(), process_group(here), model_parallel(ParallelConfig()):
        for tokens, vocabulary, supervised in sizes:
            progress(f"{tokens:,} tokens, {supervised:,} supervised, {vocabulary:,} rows")
            rows += measure(tokens, vocabulary, supervised, device)
    form = "bf16, one GPU" if device == "cuda" else "fp32, one CPU thread"
    title = f"{form}, width {WIDTH[device]}, chunks of {CHUNK}; peak beyond inputs, time after a warm-up"
    return Report(title, rows, f"--device {device}" + " --large" * large)

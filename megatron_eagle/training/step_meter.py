"""The numbers of a finished step, out of its clocks, its totals and the ranks' memory."""

import psutil
import torch

from megatron_eagle.training.metrics import StepMetrics
from megatron_eagle.training.step_totals import StepTotals

_GIB = 2**30


def measure(
    totals: StepTotals,
    device: torch.device,
    *,
    peak_tflops: float | None,
    iteration: int,
    loss: float,
    grad_norm: float,
    lr: float,
    tokens: int,
    seconds: float,
    data_seconds: float,
) -> StepMetrics:
    """Collective: memory and `data_seconds` become those of the rank that has most.

    `tokens` counts the padding of the global batch too, `seconds` the whole step. The peak of device memory
    is counted anew from here.
    """
    cuda = device.type == "cuda"
    most = torch.tensor(
        [
            data_seconds,
            psutil.Process().memory_info().rss / _GIB,
            torch.cuda.max_memory_allocated(device) / _GIB if cuda else 0.0,
        ],
        dtype=torch.float64,
        device=device,
    )
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    data_seconds, host_memory, device_memory = most.tolist()

    processes = torch.distributed.get_world_size()
    vision, language = (
        flops / processes / seconds / 1e12 for flops in (totals.flops_vision, totals.flops_language)
    )
    share_of_peak = lambda tflops: tflops / peak_tflops if peak_tflops else None  # noqa: E731
    return StepMetrics(
        iteration=iteration,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens=tokens,
        seconds=seconds,
        tflops=vision + language,
        mfu=share_of_peak(vision + language),
        data_seconds=data_seconds,
        mfu_vision=share_of_peak(vision),
        mfu_language=share_of_peak(language),
        packing=totals.tokens / tokens,
        samples=totals.samples,
        frames=totals.frames,
        frames_wanted=totals.frames_wanted,
        tiles=totals.tiles,
        tiles_wanted=totals.tiles_wanted,
        device_memory_gib=device_memory if cuda else None,
        host_memory_gib=host_memory,
        samples_by_length=_shares(totals.samples_by_length),
        tokens_by_length=_shares(totals.tokens_by_length),
    )


def _shares(counts: dict[str, int]) -> dict[str, float]:
    whole = sum(counts.values())
    return {name: value / whole if whole else 0.0 for name, value in counts.items()}

"""The numbers of a finished step, out of its clocks, its totals and the ranks' memory."""

from dataclasses import dataclass

import psutil
import torch

from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.runtime.gpus import known_gpu
from megatron_eagle.training.monitoring.dataset_losses import DatasetLosses
from megatron_eagle.training.monitoring.metrics import StepMetrics
from megatron_eagle.training.monitoring.step_totals import StepTotals

_GIB = 2**30


@dataclass(frozen=True)
class PeakChoice:
    """What the MFU is measured against."""

    tflops: float | None  # of one device; None: there is no MFU
    reason: str  # in one line


def choose_peak(stated: float | None, precision: str, device: torch.device) -> PeakChoice:
    """The peak that the run's file states (`logging.peak_tflops`), else that of the job's GPUs where the
    table has all of them: the mean, if they differ. Collective."""
    if stated is not None:
        return PeakChoice(stated, f"MFU: of {stated:g} TFLOP/s, as logging.peak_tflops says")
    advice = "logging.peak_tflops sets what it is measured against"
    if device.type != "cuda":
        return PeakChoice(None, f"no MFU: a CPU has no known peak; {advice}")
    if precision != "bf16":
        reason = f"no MFU: known peaks are those of bf16, and the run computes in {precision}; {advice}"
        return PeakChoice(None, reason)
    names: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(names, torch.cuda.get_device_name(device))
    gpus = {name: known_gpu(name) for name in names}
    peaks = {name: gpu.peak for name, gpu in gpus.items() if gpu is not None}
    unknown = [name for name in gpus if name not in peaks]
    if unknown:
        reason = f"no MFU: the peak of {unknown[0]!r} is not known (runtime/gpus.py); {advice}"
        return PeakChoice(None, reason)
    mean = sum(peaks[name] for name in names) / len(names) / 1e12
    return PeakChoice(mean, f"MFU: of {mean:g} TFLOP/s, dense bf16 of {' and '.join(peaks)} (datasheet)")


def measure(
    totals: StepTotals,
    datasets: DatasetLosses,
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
    first_pack: int,
    packs: int,
    data: DataIdentity,
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

    def share_of_peak(tflops: float) -> float | None:
        return tflops / peak_tflops if peak_tflops else None

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
        loss_by_dataset=datasets.loss,
        share_by_dataset=datasets.share,
        tokens_by_dataset=datasets.tokens,
        first_pack=first_pack,
        packs=packs,
        data=data.to_dict(),
    )


def _shares(counts: dict[str, int]) -> dict[str, float]:
    whole = sum(counts.values())
    return {name: value / whole if whole else 0.0 for name, value in counts.items()}

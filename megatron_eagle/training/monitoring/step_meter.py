"""The numbers of a finished step, out of its clocks, its totals and the ranks' memory."""

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.runtime.device import send_to
from megatron_eagle.runtime.gpus import known_gpu
from megatron_eagle.training.monitoring.metrics import StepMetrics
from megatron_eagle.training.monitoring.observer import Observer, Step

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
    unknown = [name for name in names if name not in peaks]
    if unknown:
        reason = f"no MFU: the peak of {unknown[0]!r} is not known (runtime/gpus.py); {advice}"
        return PeakChoice(None, reason)
    mean = sum(peaks[name] for name in names) / len(names) / 1e12
    return PeakChoice(mean, f"MFU: of {mean:g} TFLOP/s, dense bf16 of {' and '.join(peaks)} (datasheet)")


class StepMeter(Observer):
    """Tells the numbers of every step that was not skipped."""

    def __init__(
        self,
        device: torch.device,
        *,
        peak_tflops: float | None,
        packs: int,
        length: int,
        data: Callable[[int], DataIdentity],
    ) -> None:
        """A step reads `packs` packs of `length` tokens, `data` says what from by its first pack."""
        self._device, self._peak_tflops, self._data = device, peak_tflops, data
        self._packs, self._length = packs, length

    def step_ended(self, step: Step, tell: Observer) -> None:
        if step.grad_norm is not None:
            tell.step(self._measure(step, step.grad_norm))

    def _measure(self, step: Step, grad_norm: float) -> StepMetrics:
        """Collective: memory and `data_seconds` become those of the rank that has most.

        The peak of device memory is counted anew from here.
        """
        device, cuda = self._device, self._device.type == "cuda"
        mine = [
            step.data_seconds,
            psutil.Process().memory_info().rss / _GIB,
            torch.cuda.max_memory_allocated(device) / _GIB if cuda else 0.0,
        ]
        most = send_to(device, torch.tensor(mine, dtype=torch.float64))
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        data_seconds, host_memory, device_memory = most.tolist()

        totals, processes = step.totals, torch.distributed.get_world_size()
        tokens = self._packs * self._length  # padding included
        vision, language = (
            flops / processes / step.seconds / 1e12 for flops in (totals.flops_vision, totals.flops_language)
        )
        return StepMetrics(
            iteration=step.iteration,
            loss=step.loss,
            aux_loss=step.aux_loss,
            grad_norm=grad_norm,
            lr=step.lr,
            tokens=tokens,
            seconds=step.seconds,
            tflops=vision + language,
            mfu=self._share_of_peak(vision + language),
            data_seconds=data_seconds,
            mfu_vision=self._share_of_peak(vision),
            mfu_language=self._share_of_peak(language),
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
            packs_by_exchange=_shares(totals.packs_by_exchange),
            foreign_keys=totals.foreign_keys / totals.keys if totals.keys else None,
            exposed_transfer=totals.exposed_pairs / totals.attention_pairs if totals.keys else None,
            loss_by_dataset=step.datasets.loss,
            share_by_dataset=step.datasets.share,
            tokens_by_dataset=step.datasets.tokens,
            first_pack=step.first_pack,
            packs=self._packs,
            data=self._data(step.first_pack).to_dict(),
        )

    def _share_of_peak(self, tflops: float) -> float | None:
        return tflops / self._peak_tflops if self._peak_tflops else None


def _shares(counts: dict[str, int]) -> dict[str, float]:
    whole = sum(counts.values())
    return {name: value / whole if whole else 0.0 for name, value in counts.items()}

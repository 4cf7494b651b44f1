"""Where a process computes: its device, the communication backend and the context Megatron needs there."""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch

from megatron_eagle.runtime.megatron_cpu import megatron_on_cpu


@dataclass(frozen=True)
class Device:
    """A compute device of this process; `kind` is "cuda" or "cpu"."""

    kind: str
    index: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index) if self.kind == "cuda" else torch.device("cpu")

    @property
    def backend(self) -> str:
        """torch.distributed backend."""
        return "nccl" if self.kind == "cuda" else "gloo"

    def context(self) -> contextlib.AbstractContextManager:
        """Enter around everything that calls Megatron."""
        return contextlib.nullcontext() if self.kind == "cuda" else megatron_on_cpu()


def detect_device() -> Device:
    """CUDA device LOCAL_RANK if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return Device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(index)
    return Device("cuda", index)


@contextlib.contextmanager
def process_group(device: Device, *, timeout_minutes: float = 30):
    """The default process group: torchrun's environment, or a group of one in a single process.

    Leaves an already initialised group alone, so that a caller's group survives.
    """
    if torch.distributed.is_initialized():
        yield
        return
    options = {"backend": device.backend, "timeout": timedelta(minutes=timeout_minutes)}
    if "RANK" not in os.environ:
        options |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group(**options)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

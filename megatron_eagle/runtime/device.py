"""Where a process computes: its device, the communication backend and the context Megatron needs there."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.megatron_cpu import megatron_on_cpu
from megatron_eagle.runtime.rendezvous import check_rendezvous, explained_rendezvous


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

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Enter around everything that calls Megatron."""
        return contextlib.nullcontext() if self.kind == "cuda" else megatron_on_cpu()


def send_to(device: torch.device, host: torch.Tensor) -> torch.Tensor:
    """A host tensor on `device`. The host does not wait for what the device still has to do before."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def detect_device() -> Device:
    """CUDA device LOCAL_RANK if there is one, else the CPU.

    Raises:
        UserError: where a node has more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return Device("cpu")
    index, available = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= available:
        processes = os.environ.get("LOCAL_WORLD_SIZE", index + 1)
        raise UserError(
            f"this node has {available} GPUs, too few for the {processes} processes that it was given: "
            f"start at most --nproc-per-node {available}"
        )
    torch.cuda.set_device(index)
    return Device("cuda", index)


@contextlib.contextmanager
def process_group(device: Device, *, timeout_minutes: float = 30) -> Iterator[None]:
    """The default process group: torchrun's environment, or a group of one in a single process.

    Leaves an already initialised group alone, so that a caller's group survives.

    Raises:
        UserError: processes that torchrun has started again where they would hang, or that do not find each
            other.
    """
    if torch.distributed.is_initialized():
        yield
        return
    # Keys of the processes before are still there, with addresses where nobody listens any more.
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise UserError(
            "torchrun started these processes again, over the store of those before: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun (with its c10d rendezvous), and start again"
        )
    options: dict[str, Any] = {"backend": device.backend, "timeout": timedelta(minutes=timeout_minutes)}
    if "RANK" not in os.environ:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # missing in torch's __all__
        options |= {"store": store, "rank": 0, "world_size": 1}
    else:
        check_rendezvous(os.environ)
    with explained_rendezvous(timeout_minutes):
        torch.distributed.init_process_group(**options)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

"""GPU types that can be rehearsed: what kernels ask for, beyond the datasheets' table (`runtime/gpus.py`)."""

from dataclasses import dataclass

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.gpus import GPUS, Gpu, find_gpu


@dataclass(frozen=True)
class GpuType:
    """A GPU as `torch.cuda` describes it."""

    gpu: Gpu
    capability: tuple[int, int]
    multiprocessors: int
    source: str


# Streaming multiprocessors as sold, not of the whole die.
_TYPES = {
    "a100": ((8, 0), 108, "NVIDIA A100 architecture whitepaper"),
    "l40s": ((8, 9), 142, "NVIDIA L40S datasheet: 18,176 cores, 128 each"),
    "h100": ((9, 0), 132, "NVIDIA H100 architecture whitepaper"),
    "h100-pcie": ((9, 0), 114, "NVIDIA H100 architecture whitepaper"),
    "h200": ((9, 0), 132, "assumed: the die and the peak of the H100"),
    "b200": ((10, 0), 148, "assumed: no datasheet of NVIDIA's counts them"),
}
GPU_TYPES = {name: GpuType(GPUS[name], *facts) for name, facts in _TYPES.items()}


def find_gpu_type(name: str) -> GpuType:
    """The GPU type of this name.

    Raises:
        UserError: with all names that there are.
    """
    known = GPU_TYPES.get(name.lower())
    if known is None:
        try:
            short = find_gpu(name).short
        except UserError:
            short = ""
        known = GPU_TYPES.get(short)
    if known is None:
        raise UserError(f"--gpu {name}: not a GPU that can be rehearsed: choose {', '.join(GPU_TYPES)}")
    return known

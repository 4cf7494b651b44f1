"""GPU types that can be rehearsed: what kernels ask for, beyond the datasheets' table (`runtime/gpus.py`)."""

from dataclasses import dataclass

from megatron_eagle.errors import UserError
from megatron_eagle.planning.rates import RATES
from megatron_eagle.runtime.gpus import GPUS, Gpu, find_gpu


@dataclass(frozen=True)
class GpuType:
    """A GPU as `torch.cuda` describes it."""

    gpu: Gpu
    capability: tuple[int, int]
    multiprocessors: int
    source: str


_CAPABILITIES = {"ampere": (8, 0), "ada": (8, 9), "hopper": (9, 0), "blackwell": (10, 0)}


def _type(name: str) -> GpuType:
    gpu, count = GPUS[name], RATES[name].multiprocessors
    return GpuType(gpu, _CAPABILITIES[gpu.architecture], int(count.value), count.source)


GPU_TYPES = {name: _type(name) for name in RATES}


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

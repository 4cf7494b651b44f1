"""GPUs by the exact name that CUDA gives them: peak, memory and links of their datasheets, one table for all.

Similar names are different machines (H100 80GB HBM3, PCIe and NVL have 989, 756 and 835 TFLOP/s; a slice of a
GPU ends with "MIG ..."), so a name that is not here is not guessed at.

Names are those of NVIDIA's own list (README of NVIDIA/open-gpu-kernel-modules, "Compatible GPUs"). Figures
are those of NVIDIA's datasheet of each product; where it prints FLOP/s with sparsity, half of them. Of GPUs
that are sold as systems (HGX, DGX, NVL72) the system's figures are divided by its GPUs.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_eagle.errors import UserError

# Byte/s in one direction, half of what datasheets add up over both. PCIe GPUs may have bridges between two or
# four of them, which are left out: a node has eight.
_PCIE4, _PCIE5 = 32e9, 64e9
_NVLINK3, _NVLINK4, _NVLINK5 = 300e9, 450e9, 900e9
_NVLINK_CUT = 200e9  # A800 and H800: 400 GB/s both ways together


@dataclass(frozen=True)
class Gpu:
    """One product, SI units."""

    short: str  # as options take it
    names: tuple[str, ...]  # as `torch.cuda.get_device_name` has it
    architecture: Literal["ampere", "ada", "hopper", "blackwell"]
    peak: float  # dense bf16 FLOP/s with fp32 sums
    memory: float  # bytes
    bandwidth: float  # byte/s of that memory
    link: float  # byte/s in one direction to the other GPUs of a node

    @property
    def name(self) -> str:
        return self.names[0]


_TABLE = (
    Gpu("a100", ("NVIDIA A100-SXM4-80GB",), "ampere", 312e12, 80e9, 2039e9, _NVLINK3),
    Gpu("a100-40gb", ("NVIDIA A100-SXM4-40GB",), "ampere", 312e12, 40e9, 1555e9, _NVLINK3),
    Gpu("a100-pcie", ("NVIDIA A100 80GB PCIe",), "ampere", 312e12, 80e9, 1935e9, _PCIE4),
    Gpu("a100-pcie-40gb", ("NVIDIA A100-PCIE-40GB",), "ampere", 312e12, 40e9, 1555e9, _PCIE4),
    Gpu("a800", ("NVIDIA A800-SXM4-80GB",), "ampere", 312e12, 80e9, 2039e9, _NVLINK_CUT),
    Gpu("a800-40gb", ("NVIDIA A800-SXM4-40GB",), "ampere", 312e12, 40e9, 1555e9, _NVLINK_CUT),
    Gpu("a800-pcie", ("NVIDIA A800 80GB PCIe",), "ampere", 312e12, 80e9, 1935e9, _PCIE4),
    Gpu("a30", ("NVIDIA A30",), "ampere", 165e12, 24e9, 933e9, _PCIE4),
    Gpu("a40", ("NVIDIA A40",), "ampere", 149.7e12, 48e9, 696e9, _PCIE4),
    Gpu("a10", ("NVIDIA A10",), "ampere", 125e12, 24e9, 600e9, _PCIE4),
    Gpu("a10g", ("NVIDIA A10G",), "ampere", 70e12, 24e9, 600e9, _PCIE4),
    Gpu("a6000", ("NVIDIA RTX A6000",), "ampere", 154.8e12, 48e9, 768e9, _PCIE4),
    Gpu("l40s", ("NVIDIA L40S",), "ada", 362.05e12, 48e9, 864e9, _PCIE4),
    Gpu("l40", ("NVIDIA L40",), "ada", 181.05e12, 48e9, 864e9, _PCIE4),
    Gpu("l20", ("NVIDIA L20",), "ada", 119.5e12, 48e9, 864e9, _PCIE4),
    Gpu("l4", ("NVIDIA L4",), "ada", 121e12, 24e9, 300e9, _PCIE4),
    Gpu("6000-ada", ("NVIDIA RTX 6000 Ada Generation",), "ada", 364.2e12, 48e9, 960e9, _PCIE4),
    Gpu("h100", ("NVIDIA H100 80GB HBM3",), "hopper", 989e12, 80e9, 3.35e12, _NVLINK4),
    Gpu("h100-pcie", ("NVIDIA H100 PCIe",), "hopper", 756e12, 80e9, 2.0e12, _PCIE5),
    Gpu("h100-nvl", ("NVIDIA H100 NVL",), "hopper", 835e12, 94e9, 3.9e12, _PCIE5),
    Gpu("h800", ("NVIDIA H800",), "hopper", 989e12, 80e9, 3.35e12, _NVLINK_CUT),
    Gpu("h800-pcie", ("NVIDIA H800 PCIe",), "hopper", 756e12, 80e9, 2.0e12, _PCIE5),
    Gpu("h20", ("NVIDIA H20",), "hopper", 148e12, 96e9, 4.0e12, _NVLINK4),
    Gpu("h20-3e", ("NVIDIA H20-3e",), "hopper", 148e12, 141e9, 4.8e12, _NVLINK4),
    Gpu("h200", ("NVIDIA H200",), "hopper", 989e12, 141e9, 4.8e12, _NVLINK4),
    Gpu("h200-nvl", ("NVIDIA H200 NVL",), "hopper", 835e12, 141e9, 4.8e12, _PCIE5),
    # 480GB and 120GB are the CPU's memory.
    Gpu("gh200", ("NVIDIA GH200 480GB", "NVIDIA GH200 120GB"), "hopper", 989e12, 96e9, 4.0e12, _NVLINK4),
    Gpu("gh200-144gb", ("NVIDIA GH200 144G HBM3e",), "hopper", 989e12, 144e9, 4.9e12, _NVLINK4),
    Gpu("b200", ("NVIDIA B200",), "blackwell", 2250e12, 180e9, 7.7e12, _NVLINK5),
    Gpu("gb200", ("NVIDIA GB200",), "blackwell", 2500e12, 186e9, 8.0e12, _NVLINK5),
    Gpu("b300", ("NVIDIA B300 SXM6 AC",), "blackwell", 2250e12, 270e9, 7.7e12, _NVLINK5),
    Gpu("gb300", ("NVIDIA GB300",), "blackwell", 2500e12, 279e9, 8.0e12, _NVLINK5),
)
GPUS = {gpu.short: gpu for gpu in _TABLE}
_BY_NAME = {name: gpu for gpu in _TABLE for name in gpu.names}


def known_gpu(name: str) -> Gpu | None:
    """The GPU of exactly this name of CUDA's, if it is in the table."""
    return _BY_NAME.get(name)


def find_gpu(name: str) -> Gpu:
    """The GPU that a user calls by its short name, or by CUDA's.

    Raises:
        UserError: with all short names.
    """
    found = GPUS.get(name.lower()) or known_gpu(name)
    if found is None:
        raise UserError(
            f"there is no GPU {name!r} in the table (runtime/gpus.py): choose {', '.join(GPUS)}, or CUDA's "
            "exact name of one of them"
        )
    return found

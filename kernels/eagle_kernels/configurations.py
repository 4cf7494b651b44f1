"""Launch settings of every kernel, a table by GPU architecture: nothing is tuned at run time.

Each entry goes through the compile gate (tests/kernels/test_compiled.py). None has been timed: they differ in
the number of multiprocessors alone until `tools/bench.py kernels` has run on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from eagle_kernels.dispatch import is_interpreted, triton


@dataclass(frozen=True)
class Block:
    """Elements that a program takes at a time, and its warps."""

    size: int
    warps: int


@dataclass(frozen=True)
class Configuration:
    """Settings of one architecture."""

    programs: int  # of a kernel that walks over rows
    norm_elements: int = 16  # a thread of a norm; a norm takes 4 to 16 warps
    swiglu: Block = Block(1024, 4)  # columns
    rope: Block = Block(32, 4)  # heads, at most
    cross_entropy: Block = Block(4096, 8)  # vocabulary rows

    def norm(self, width: int) -> Block:
        """Of a norm over rows of `width` elements, which it takes whole."""
        size = triton.next_power_of_2(width)
        return Block(size, min(max(size // (self.norm_elements * 32), 4), 16))

    def rows(self, rows: int) -> int:
        """Rows that one program walks over: a power of two, so that few variants are ever compiled."""
        return int(triton.next_power_of_2(max(1, triton.cdiv(rows, self.programs))))


_WAVES = 8  # programs a multiprocessor
# By compute capability, 10 * major + minor: A100, H100 and H200, B200.
ARCHITECTURES = {
    80: Configuration(programs=_WAVES * 108),
    90: Configuration(programs=_WAVES * 132),
    100: Configuration(programs=_WAVES * 148),
}
# The interpreter pays milliseconds for each program.
INTERPRETER = Configuration(programs=8)


@cache
def configuration(device: torch.device) -> Configuration:
    """The entry for `device`: of the newest architecture that is not newer than it.

    Raises:
        ValueError: the device is older than all of them.
    """
    if is_interpreted():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    known = [architecture for architecture in ARCHITECTURES if architecture <= capability]
    if not known:
        raise ValueError(
            f"kernels triton: compute capability {major}.{minor} is below {min(ARCHITECTURES) / 10}; "
            "choose eager"
        )
    return ARCHITECTURES[max(known)]

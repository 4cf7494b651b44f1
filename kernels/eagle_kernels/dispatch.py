"""The choice between a Triton kernel and its eager twin, and what all kernels share.

`auto` takes Triton for CUDA tensors and the eager twin elsewhere. `triton` on CPU tensors works only in
Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests.
"""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton as _triton
    import triton.language as _tl
except ImportError:  # the eager twins need none
    _triton = _tl = None

triton: Any = _triton
tl: Any = _tl

Implementation = Literal["auto", "triton", "eager"]


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`, or the plain function where triton is missing (it is never launched there)."""
    return triton.jit(function) if triton else function


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    if triton is None:
        return False
    knobs = getattr(triton, "knobs", None)  # from Triton 3.4 on
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET", "0") == "1"


def explain(implementation: Implementation, device: torch.device) -> tuple[bool, str]:
    """Whether Triton computes what lies on `device`, and why, in one line.

    Raises:
        ValueError: Triton was asked for and cannot run there, or the word is unknown.
    """
    if implementation not in ("auto", "triton", "eager"):
        raise ValueError(f"kernels must be auto, triton or eager, not {implementation!r}")
    if implementation == "eager":
        return False, "eager, as asked for"
    obstacle = None
    if triton is None:
        obstacle = "triton is not installed"
    elif device.type != "cuda" and not (implementation == "triton" and is_interpreted()):
        obstacle = f"the tensors are on {device.type}, not on CUDA"
    if obstacle is None:
        return True, "triton, as asked for" if implementation == "triton" else "triton (auto, on CUDA)"
    if implementation == "triton":
        raise ValueError(f"kernels triton: {obstacle}; choose auto or eager")
    return False, f"eager (auto: {obstacle})"


def use_triton(implementation: Implementation, x: Tensor) -> bool:
    """Whether Triton computes on x; see `explain`."""
    return explain(implementation, x.device)[0]


def as_rows(x: Tensor) -> Tensor:
    """[..., h] -> [rows, h] with adjacent elements in each row, copied only if it must be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def check_width(name: str, width: int) -> None:
    """Refuse rows that cannot be read 128 bits at a time.

    Raises:
        ValueError: `width` is no multiple of 16 elements.
    """
    if width % 16:
        raise ValueError(
            f"{name}: the row length must be a multiple of 16 for the Triton kernel, got {width}"
        )


def check_same(name: str, **tensors: Tensor) -> None:
    """Refuse tensors that do not agree with the first.

    Raises:
        ValueError: one has another dtype, or lies on another device.
    """
    (first, x), *others = tensors.items()
    for other, tensor in others:
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name}: {other} is {tensor.dtype} on {tensor.device}, {first} is {x.dtype} on {x.device}; "
                "they must agree"
            )

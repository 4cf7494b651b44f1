"""Triton 3.6's interpreter computes bf16 on its bit patterns; this repairs casts, arithmetic and dots.

Without it, sums, comparisons and casts of bf16 are silently wrong. Kernels here convert to fp32 at once,
so that only the casts matter; arithmetic is repaired all the same, so that a kernel that forgets is right
in tests for the right reason or wrong visibly.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _round(values: np.ndarray) -> np.ndarray:
    """fp32 -> bit patterns of bf16, to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def repair() -> None:
    """Patch the interpreter of this process, which must be one made for tests."""
    cast, binary, dot = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.binary_op,
        InterpreterBuilder.create_dot,
    )

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(_round(source.data), tl.bfloat16)
        if _is_bf16(source) and target.scalar == tl.float32:
            return _widened(source)
        return cast(self, source, target)

    def binary_op(self, left, right, op):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, op)
        out = binary(self, _widened(left), _widened(right), op)
        return out if out.data.dtype == np.bool_ else TensorHandle(_round(out.data), tl.bfloat16)

    def create_dot(self, a, b, accumulator, precision, max_imprecise):
        return dot(self, _widened(a), _widened(b), accumulator, precision, max_imprecise)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = create_dot

"""SwiGLU on a packed gate|up: y = silu(gate) * up, silu rounded to the input's type first, as Qwen2 does.

Backward keeps only gate|up and can write its gradient over it (`reuse_input`): where its producer, a linear
layer, needs its output no more, this saves the largest activation gradient of a layer. The linear layer that
reads y need not keep it either (`forget_product`): a third of what an MLP keeps, n b bytes a row, for one
more run of the forward kernel.
Bytes moved per element of y of type size b: forward 3b, backward 5b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_kernels.configurations import configuration
from eagle_kernels.dispatch import (
    Implementation,
    as_rows,
    check_width,
    jit,
    tl,
    triton,
    use_triton,
)


def swiglu(gate_up: Tensor, implementation: Implementation = "auto", reuse_input: bool = False) -> Tensor:
    """gate_up [..., 2n], gate first -> [..., n].

    Args:
        reuse_input: the Triton backward overwrites gate_up with its gradient. Only where nothing else reads
            gate_up after the forward, and backward runs once.

    Raises:
        ValueError: an odd row length; for Triton also if n is no multiple of 16.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate|up needs an even row length, got {gate_up.shape[-1]}")
    if not use_triton(implementation, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    check_width("swiglu", gate_up.shape[-1] // 2)
    y: Tensor = _SwiGLU.apply(gate_up, reuse_input)
    return y


@contextlib.contextmanager
def forget_product(y: Tensor, gate_up: Tensor, implementation: Implementation = "auto") -> Iterator[None]:
    """Inside, what saves y for its backward saves nothing: y is computed again, each time, from gate_up.

    For the consumers of y = swiglu(gate_up), which must run backward before swiglu's own overwrites gate_up.
    """
    # y itself must not be kept by what follows.
    saved, address, elements = gate_up.detach(), y.data_ptr(), y.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        is_product = tensor.data_ptr() == address and tensor.numel() == elements
        return tensor.shape if is_product else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return swiglu(saved, implementation).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@jit
def forward_kernel(GATE_UP, Y, n_rows, stride, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """BLOCK columns of ROWS rows."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = (columns < width) & (row < n_rows)
        at = GATE_UP + row * stride + columns
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        silu = (gate * tl.sigmoid(gate)).to(Y.dtype.element_ty).to(tl.float32)
        tl.store(Y + row * width + columns, (silu * up).to(Y.dtype.element_ty), mask=mask)


@jit
def backward_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    GRAD,
    GATE_UP,
    GRAD_GATE_UP,
    n_rows,
    grad_stride,
    stride,
    out_stride,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of ROWS rows of dgate|dup; GRAD_GATE_UP may be GATE_UP itself."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = (columns < width) & (row < n_rows)
        at = GATE_UP + row * stride + columns
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        grad_up = grad * gate * sigmoid
        to = GRAD_GATE_UP + row * out_stride + columns
        tl.store(to, grad_gate.to(GRAD_GATE_UP.dtype.element_ty), mask=mask)
        tl.store(to + width, grad_up.to(GRAD_GATE_UP.dtype.element_ty), mask=mask)


def _launch(rows: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """rows [n, 2 * width] -> grid, and what the kernels are compiled for."""
    settings, n_rows, width = configuration(rows.device), rows.shape[0], rows.shape[1] // 2
    columns = triton.cdiv(width, settings.swiglu.size)
    step = settings.rows(n_rows * columns)
    constants = {"ROWS": step, "BLOCK": settings.swiglu.size, "num_warps": settings.swiglu.warps}
    return (triton.cdiv(n_rows, step), columns), constants


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, reuse_input: bool) -> Tensor:
        rows = as_rows(gate_up)
        n_rows, width = rows.shape[0], rows.shape[1] // 2
        y = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
        grid, constants = _launch(rows)
        forward_kernel[grid](rows, y, n_rows, rows.stride(0), width, **constants)
        ctx.save_for_backward(rows)
        ctx.shape, ctx.reuse_input = gate_up.shape, reuse_input
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        n_rows, width = rows.shape[0], rows.shape[1] // 2
        grad_rows = as_rows(grad)
        out = rows if ctx.reuse_input else torch.empty_like(rows, memory_format=torch.contiguous_format)
        grid, constants = _launch(rows)
        backward_kernel[grid](
            grad_rows,
            rows,
            out,
            n_rows,
            grad_rows.stride(0),
            rows.stride(0),
            out.stride(0),
            width,
            **constants,
        )
        return out.view(ctx.shape), None

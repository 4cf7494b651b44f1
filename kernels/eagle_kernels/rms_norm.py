"""RMSNorm in the rounding order of Qwen2: normalise in fp32, round to the input's type, then scale.

y = weight * (x / sqrt(mean(x^2) + eps)).to(x.dtype). Scaling before rounding differs in bf16 by up
to one unit in the last place per layer, which a converted checkpoint would show.

Bytes moved per element of type size b: forward 2b, backward 3b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagle_kernels.configurations import configuration
from eagle_kernels.dispatch import (
    Implementation,
    as_rows,
    check_same,
    check_width,
    jit,
    tl,
    triton,
    use_triton,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, implementation: Implementation = "auto") -> Tensor:
    """x [..., h], weight [h] -> [..., h] in x's type.

    Raises:
        ValueError: shapes, types or devices differ; for Triton also if h is no multiple of 16.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: shapes do not fit: x {list(x.shape)}, weight {list(weight.shape)}")
    if not use_triton(implementation, x):
        x32 = x.float()
        return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    check_same("rms_norm", x=x, weight=weight)
    check_width("rms_norm", x.shape[-1])
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


@jit
def forward_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    X,
    WEIGHT,
    Y,
    RSTD,
    n_rows,
    x_stride,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows: Y, and 1 / rms in RSTD."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = inside & (row < n_rows)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(RSTD + row, rstd, mask=row < n_rows)
        y = (x * rstd).to(Y.dtype.element_ty).to(tl.float32) * weight
        tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=mask)


@jit
def backward_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    GRAD,
    X,
    WEIGHT,
    RSTD,
    GRAD_X,
    GRAD_WEIGHT,
    n_rows,
    grad_stride,
    x_stride,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GRAD_X of ROWS rows, and their share of the weight's gradient in fp32 as a row of GRAD_WEIGHT."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for i in range(ROWS):
        row = program * ROWS + i
        mask = inside & (row < n_rows)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < n_rows, other=0.0)
        normed = x * rstd
        grad_weight += grad * normed.to(X.dtype.element_ty).to(tl.float32)
        scaled = weight * grad
        grad_x = (scaled - normed * (tl.sum(normed * scaled, axis=0) / width)) * rstd
        tl.store(GRAD_X + row * width + columns, grad_x.to(GRAD_X.dtype.element_ty), mask=mask)
    tl.store(GRAD_WEIGHT + program * width + columns, grad_weight, mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = as_rows(x)
        (n_rows, width), settings = rows.shape, configuration(x.device)
        block, step = settings.norm(width), settings.rows(n_rows)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        forward_kernel[(triton.cdiv(n_rows, step),)](
            rows,
            weight,
            y,
            rstd,
            n_rows,
            rows.stride(0),
            width,
            eps,
            ROWS=step,
            BLOCK=block.size,
            num_warps=block.warps,
        )
        ctx.save_for_backward(rows, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        (n_rows, width), settings = x.shape, configuration(x.device)
        block, step = settings.norm(width), settings.rows(n_rows)
        grad_rows = as_rows(grad)
        grad_x = torch.empty(grad.shape, dtype=x.dtype, device=x.device)
        programs = triton.cdiv(n_rows, step)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        backward_kernel[(programs,)](
            grad_rows,
            x,
            weight,
            rstd,
            grad_x,
            partial,
            n_rows,
            grad_rows.stride(0),
            x.stride(0),
            width,
            ROWS=step,
            BLOCK=block.size,
            num_warps=block.warps,
        )
        return grad_x, partial.sum(0).to(weight.dtype), None

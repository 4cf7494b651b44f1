"""LayerNorm of the vision encoder: y = (x - mean) / sqrt(var + eps) * weight + bias, rounded once at the end.

Bytes moved per element of type size b: forward 2b, backward 3b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, implementation: Implementation = "auto"
) -> Tensor:
    """x [..., h], weight and bias [h] -> [..., h] in x's type.

    Raises:
        ValueError: shapes, types or devices differ; for Triton also if h is no multiple of 16.
    """
    if not weight.shape == bias.shape == x.shape[-1:]:
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"layer_norm: shapes do not fit: {shapes}")
    if not use_triton(implementation, x):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    check_same("layer_norm", x=x, weight=weight, bias=bias)
    check_width("layer_norm", x.shape[-1])
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps)
    return y


@jit
def forward_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    X,
    WEIGHT,
    BIAS,
    Y,
    MEAN,
    RSTD,
    n_rows,
    x_stride,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows: Y, and mean and 1 / deviation for backward."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = inside & (row < n_rows)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
        tl.store(MEAN + row, mean, mask=row < n_rows)
        tl.store(RSTD + row, rstd, mask=row < n_rows)
        y = centred * rstd * weight + bias
        tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=mask)


@jit
def backward_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    GRAD,
    X,
    WEIGHT,
    MEAN,
    RSTD,
    GRAD_X,
    GRAD_WEIGHT,
    GRAD_BIAS,
    n_rows,
    grad_stride,
    x_stride,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GRAD_X of ROWS rows, and their shares of the gradients of weight and bias in fp32."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for i in range(ROWS):
        row = program * ROWS + i
        mask = inside & (row < n_rows)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + row, mask=row < n_rows, other=0.0)
        rstd = tl.load(RSTD + row, mask=row < n_rows, other=0.0)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        grad_weight += grad * normed
        grad_bias += grad
        scaled = weight * grad
        along = tl.sum(normed * scaled, axis=0) / width
        grad_x = (scaled - tl.sum(scaled, axis=0) / width - normed * along) * rstd
        tl.store(GRAD_X + row * width + columns, grad_x.to(GRAD_X.dtype.element_ty), mask=mask)
    tl.store(GRAD_WEIGHT + program * width + columns, grad_weight, mask=inside)
    tl.store(GRAD_BIAS + program * width + columns, grad_bias, mask=inside)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        rows = as_rows(x)
        (n_rows, width), settings = rows.shape, configuration(x.device)
        block, step = settings.norm(width), settings.rows(n_rows)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        mean, rstd = torch.empty(2, n_rows, dtype=torch.float32, device=x.device)
        forward_kernel[(triton.cdiv(n_rows, step),)](
            rows,
            weight,
            bias,
            y,
            mean,
            rstd,
            n_rows,
            rows.stride(0),
            width,
            eps,
            ROWS=step,
            BLOCK=block.size,
            num_warps=block.warps,
        )
        ctx.save_for_backward(rows, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (n_rows, width), settings = x.shape, configuration(x.device)
        block, step = settings.norm(width), settings.rows(n_rows)
        grad_rows = as_rows(grad)
        grad_x = torch.empty(grad.shape, dtype=x.dtype, device=x.device)
        programs = triton.cdiv(n_rows, step)
        grad_weight, grad_bias = torch.empty(2, programs, width, dtype=torch.float32, device=x.device)
        backward_kernel[(programs,)](
            grad_rows,
            x,
            weight,
            mean,
            rstd,
            grad_x,
            grad_weight,
            grad_bias,
            n_rows,
            grad_rows.stride(0),
            x.stride(0),
            width,
            ROWS=step,
            BLOCK=block.size,
            num_warps=block.warps,
        )
        return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(weight.dtype), None

"""RMSNorm in the rounding order of Qwen2: normalise in fp32, round to the input's type, then scale.

y = weight * (x / sqrt(mean(x^2) + eps)).to(x.dtype). Scaling before rounding differs in bf16 by up
to one unit in the last place per layer, which a converted checkpoint would show.

With a residual, x is first added to it and rounded, and the sum comes back too: one pass over memory instead
of two. Bytes moved per element of type size b: forward 2b (with a residual 4b), backward 3b (4b).
"""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_kernels.dispatch import (
    Implementation,
    as_rows,
    check_same,
    check_width,
    jit,
    rows_per_program,
    tl,
    triton,
    use_triton,
    warps,
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """x [..., h], weight [h] -> [..., h] in x's type; with a residual like x: (norm of the sum, the sum).

    Raises:
        ValueError: shapes, types or devices differ; for Triton also if h is no multiple of 16.
    """
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}"
        shapes += f", residual {list(residual.shape)}" if residual is not None else ""
        raise ValueError(f"rms_norm: shapes do not fit: {shapes}")
    if not use_triton(implementation, x):
        return _eager(x, weight, eps, residual)
    check_same("rms_norm", x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    check_width("rms_norm", x.shape[-1])
    y, total = _RMSNorm.apply(x, weight, eps, residual)
    return y if residual is None else (y, total)


def _eager(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    x32 = total.float()
    y = weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if residual is None else (y, total)


@jit
def forward_kernel(
    X,
    RESIDUAL,
    WEIGHT,
    SUM,
    Y,
    RSTD,
    n_rows,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows: Y, 1 / rms in RSTD, and x + residual in SUM."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = inside & (row < n_rows)
        x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(RESIDUAL + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(SUM.dtype.element_ty)
            tl.store(SUM + row * width + columns, rounded, mask=mask)
            x = rounded.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(RSTD + row, rstd, mask=row < n_rows)
        y = (x * rstd).to(Y.dtype.element_ty).to(tl.float32) * weight
        tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=mask)


@jit
def backward_kernel(
    GRAD,
    GRAD_SUM,
    X,
    WEIGHT,
    RSTD,
    GRAD_X,
    GRAD_WEIGHT,
    n_rows,
    grad_stride,
    x_stride,
    width,
    HAS_RESIDUAL: tl.constexpr,
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
        if HAS_RESIDUAL:
            grad_x += tl.load(GRAD_SUM + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(GRAD_X + row * width + columns, grad_x.to(GRAD_X.dtype.element_ty), mask=mask)
    tl.store(GRAD_WEIGHT + program * width + columns, grad_weight, mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        rows = as_rows(x)
        (n_rows, width), block = rows.shape, triton.next_power_of_2(x.shape[-1])
        added = as_rows(residual) if residual is not None else rows
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        total = torch.empty_like(y) if residual is not None else None
        rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        step = rows_per_program(n_rows)
        forward_kernel[(triton.cdiv(n_rows, step),)](
            rows,
            added,
            weight,
            y if total is None else total,
            y,
            rstd,
            n_rows,
            rows.stride(0),
            added.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            ROWS=step,
            BLOCK=block,
            num_warps=warps(block),
        )
        ctx.save_for_backward(rows if total is None else total.view(n_rows, width), weight, rstd)
        ctx.has_residual = total is not None
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        x, weight, rstd = ctx.saved_tensors
        if grad is None:
            return grad_total, None, None, grad_total
        (n_rows, width), block = x.shape, triton.next_power_of_2(x.shape[-1])
        grad_rows = as_rows(grad)
        grad_x = torch.empty(grad.shape, dtype=x.dtype, device=x.device)
        step = rows_per_program(n_rows)
        programs = triton.cdiv(n_rows, step)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        backward_kernel[(programs,)](
            grad_rows,
            grad_rows if grad_total is None else grad_total.contiguous(),
            x,
            weight,
            rstd,
            grad_x,
            partial,
            n_rows,
            grad_rows.stride(0),
            x.stride(0),
            width,
            HAS_RESIDUAL=grad_total is not None,
            ROWS=step,
            BLOCK=block,
            num_warps=warps(block),
        )
        grad_weight = partial.sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, grad_x if ctx.has_residual else None

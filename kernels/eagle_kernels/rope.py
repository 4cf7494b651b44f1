"""Rotary positions with a position per token: packed documents and context parallel chunks need no more.

Half-split rotation in the rounding order of Qwen2: with x = [a, b] in halves, y = [a cos - b sin,
b cos + a sin], where cosines, sines, products and sums are rounded to the type of x, as transformers and
vLLM do. Cosines and sines come from a table made once a step: computed inside the kernel they would spill
registers. Bytes moved per element of type size b: 2b, forward and backward; the table is small beside all
heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eagle_kernels.configurations import configuration
from eagle_kernels.dispatch import Implementation, jit, tl, triton, use_triton


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """Angles per position, fp32 [dim / 2] on the CPU: the bits of transformers' `Qwen2RotaryEmbedding`.

    They come of this order of operations on a CPU; `base**-exponent` or a GPU's power differ in the last bit,
    and cosines then by up to 8e-3 at position 131,071.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return 1.0 / base**exponent


def yarn_frequencies(
    dim: int,
    base: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """`inverse_frequencies` stretched by YaRN (arXiv 2309.00071, section 3.2), in transformers' bits.

    Channels that turn `beta_fast` times or more within `original_length` tokens keep their angles; those that
    turn `beta_slow` times or less turn `factor` times slower; between them is a linear ramp over channels,
    whose ends are whole channels if `truncate`.
    """

    def channel(turns: float) -> float:
        """Which channel turns so often within the original length."""
        return (dim * math.log(original_length / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = channel(beta_fast), channel(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: a step instead of a division by zero
    wavelengths = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def rotary_table(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32, amplitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """positions [s], `inverse_frequencies` [d / 2] on their device -> cosines and sines [s, d / 2].

    Formed in fp32 and multiplied by `amplitude`, then rounded to `dtype`, the type of what will be rotated.
    """
    angles = torch.outer(positions.float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    if amplitude != 1:
        cos, sin = cos * amplitude, sin * amplitude
    return cos.to(dtype), sin.to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, implementation: Implementation = "auto") -> Tensor:
    """x [s, heads, d], cos and sin [s, d / 2] of `rotary_table` -> [s, heads, d].

    Raises:
        ValueError: shapes differ; for Triton also if d / 2 is no power of two.
    """
    if x.dim() != 3 or not cos.shape == sin.shape == (x.shape[0], x.shape[-1] // 2):
        shapes = f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}"
        raise ValueError(f"rope: shapes do not fit: {shapes}")
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not use_triton(implementation, x):
        a, b = x.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    half = x.shape[-1] // 2
    if half & (half - 1):
        raise ValueError(f"rope: half of the head size must be a power of two for Triton, got {half}")
    y: Tensor = _Rope.apply(x, cos.contiguous(), sin.contiguous())
    return y


@jit
def rotate_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    X,
    COS,
    SIN,
    Y,
    n_rows,
    n_heads,
    row_stride,
    head_stride,
    BACKWARD: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """HEADS heads of ROWS tokens; backward rotates the other way. Products are rounded as in eager torch."""
    columns = tl.arange(0, HALF)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i
        mask = (heads < n_heads)[:, None] & (row < n_rows)
        cos = tl.load(COS + row * HALF + columns, mask=row < n_rows, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(SIN + row * HALF + columns, mask=row < n_rows, other=0.0).to(tl.float32)[None, :]
        if BACKWARD:
            sin = -sin
        at = X + row * row_stride + heads[:, None] * head_stride + columns[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        a_cos = (a * cos).to(Y.dtype.element_ty).to(tl.float32)
        b_sin = (b * sin).to(Y.dtype.element_ty).to(tl.float32)
        b_cos = (b * cos).to(Y.dtype.element_ty).to(tl.float32)
        a_sin = (a * sin).to(Y.dtype.element_ty).to(tl.float32)
        to = Y + (row * n_heads + heads[:, None]) * (2 * HALF) + columns[None, :]
        tl.store(to, (a_cos - b_sin).to(Y.dtype.element_ty), mask=mask)
        tl.store(to + HALF, (b_cos + a_sin).to(Y.dtype.element_ty), mask=mask)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (n_rows, n_heads, dim), settings = x.shape, configuration(x.device)
    heads = min(triton.next_power_of_2(n_heads), settings.rope.size)
    step = settings.rows(n_rows)
    rotate_kernel[(triton.cdiv(n_rows, step), triton.cdiv(n_heads, heads))](
        x,
        cos,
        sin,
        y,
        n_rows,
        n_heads,
        x.stride(0),
        x.stride(1),
        BACKWARD=backward,
        HALF=dim // 2,
        HEADS=heads,
        ROWS=step,
        num_warps=settings.rope.warps,
    )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, backward=True), None, None

"""The output layer and its cross-entropy in one, without ever holding the logits of a whole sequence.

    loss_i = lse_i - logit_i[label_i],   lse_i = log sum_v exp(x_i . w_v)

Unsupervised tokens (weight 0) are dropped first. The rest goes through in chunks: logits, then maximum, sum
of exponentials and the label's logit, over all tensor parallel ranks by one MAX and one SUM all-reduce; then,
in the buffer of the logits, their gradient times the token's weight; then the gradients of x and of the
weight, the latter summed in fp32. Three matrix products per chunk and no recomputation.

Over several ranks two chunks are under way, so that both all-reduces of a chunk travel beside products: the
MAX beside the two gradient products of the chunk before, the SUM beside the logits of the one after. Numbers
and the order of sums are those of one chunk after the other; the cost is a second chunk's logits.

The gradients are formed in forward, for the loss sum_i token_weight_i * loss_i: backward checks that it is
asked for exactly that, or for a multiple.

Memory beyond inputs, for t supervised tokens, V vocabulary rows of this rank, chunks of c, element size b:
t h b (gradient of x) + c V b (logits; eager in bf16: c V (b + 4)) + 4 V h (gradient of the weight; nothing
with `into_main_grad`). Over several ranks the logits count twice. Plain torch holds t V twice, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eagle_kernels.configurations import configuration
from eagle_kernels.dispatch import Implementation, check_same, check_width, jit, tl, triton, use_triton

CHUNK = 2048  # tokens: large enough for full-speed products, 0.6 GB of bf16 logits at 152,064 rows


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    supervised: Tensor | None = None,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    sum_input_gradient: bool = True,
    chunk_size: int = CHUNK,
    into_main_grad: bool = False,
    pipelined: bool = True,
    implementation: Implementation = "auto",
) -> Tensor:
    """Per-token loss fp32 [t], 0 where token_weights is 0, to be summed with `token_weights`.

    Args:
        x: [t, h], all tokens on every rank of `group`.
        weight: [rows, h], this rank's vocabulary rows; ranks hold equally many, in order.
        labels: [t] int64 over the whole vocabulary; read only where the token's weight is not 0.
        token_weights: [t] fp32, the same on every rank of `group`.
        supervised: int64, places of the tokens with a weight, in order, where the caller knows them and has
            looked at their labels; None: found here, for which the host waits for the device.
        vocab_size: rows of the whole vocabulary; those beyond are padding and get no probability. None: all.
        group: tensor parallel ranks; None: this rank holds the whole vocabulary.
        sum_input_gradient: sum the gradient of x over `group`. False where x was gathered from sequence
            parallel shards, whose backward does it.
        chunk_size: supervised tokens per chunk.
        into_main_grad: add the weight's gradient to `weight.main_grad` (fp32) and set
            `weight.grad_added_to_main_grad`, in Megatron's way. It is added in forward: never under a
            recomputation that runs forward twice with gradients, and the upstream factor must be 1.
        pipelined: two chunks under way over several ranks; False: one, with half the logits.

    Raises:
        ValueError: shapes or types do not fit, or labels out of range.
        RuntimeError: in backward, if the loss was not the sum with `token_weights`.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"linear_cross_entropy: x {list(x.shape)} does not fit weight {list(weight.shape)}")
    if not labels.shape == token_weights.shape == x.shape[:1]:
        shapes = f"labels {list(labels.shape)}, token_weights {list(token_weights.shape)}"
        raise ValueError(f"linear_cross_entropy: {shapes} for {x.shape[0]} tokens")
    if token_weights.dtype != torch.float32 or labels.dtype != torch.int64:
        types = f"labels {labels.dtype}, token_weights {token_weights.dtype}"
        raise ValueError(f"linear_cross_entropy: {types}; they must be int64 and float32")
    check_same("linear_cross_entropy", x=x, weight=weight)
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    n_rows = weight.shape[0]
    vocab_size = ranks * n_rows if vocab_size is None else vocab_size
    triton_runs = use_triton(implementation, x)
    if triton_runs:
        check_width("linear_cross_entropy, rows of the weight", n_rows)
    if supervised is None:
        supervised = token_weights.nonzero().squeeze(1)
        _check_labels(labels[supervised], vocab_size)
    into_main_grad = into_main_grad and torch.is_grad_enabled() and weight.requires_grad
    if into_main_grad and getattr(getattr(weight, "main_grad", None), "dtype", None) != torch.float32:
        raise ValueError("linear_cross_entropy: into_main_grad needs weight.main_grad in fp32")
    task = _Task(
        supervised=supervised,
        labels=labels - rank * n_rows,
        token_weights=token_weights,
        real_rows=min(max(vocab_size - rank * n_rows, 0), n_rows),
        group=group if ranks > 1 else None,
        sum_input_gradient=sum_input_gradient,
        chunk_size=chunk_size,
        into_main_grad=into_main_grad,
        pipelined=pipelined and ranks > 1,
        use_triton=triton_runs,
        gradients=torch.is_grad_enabled(),
    )
    losses: Tensor = _LinearCrossEntropy.apply(x, weight, task)
    return losses


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    wrong = labels[(labels < 0) | (labels >= vocab_size)]
    if wrong.numel():
        raise ValueError(
            f"linear_cross_entropy: {wrong.numel()} supervised labels are outside 0..{vocab_size - 1}, "
            f"the first is {wrong[0].item()}"
        )


@dataclass(frozen=True)
class _Task:
    supervised: Tensor  # [n] int64, places of the supervised tokens
    labels: Tensor  # [t] int64 relative to this rank's first row
    token_weights: Tensor  # [t] fp32
    real_rows: int  # of this rank
    group: dist.ProcessGroup | None
    sum_input_gradient: bool
    chunk_size: int
    into_main_grad: bool
    pipelined: bool
    use_triton: bool
    gradients: bool

    @property
    def product_rows(self) -> int:
        """Rows that take part in the products: the real ones, filled up to the alignment of fast loads. (The
        weight has them: its row count is a multiple of 16 where Triton runs.)"""
        return -(-self.real_rows // 16) * 16 if self.use_triton else self.real_rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, task: _Task) -> Tensor:
        rows = weight.detach()[: task.product_rows]
        statistics, gradient = (
            (_triton_statistics, _triton_gradient) if task.use_triton else (_statistics, _gradient)
        )
        for_x, for_weight = (task.gradients and needed for needed in ctx.needs_input_grad[:2])
        losses = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
        grad_x = x.new_empty(len(task.supervised), x.shape[1]) if for_x else None
        grad_weight: Tensor | None = None
        if task.into_main_grad:
            grad_weight = weight.main_grad  # type: ignore[attr-defined]  # Megatron sets it
        elif for_weight:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)

        def finish(chunk: _Chunk) -> None:
            lse, target = chunk.finish_sums()
            losses[chunk.tokens] = lse - target
            if not (for_x or for_weight):
                return
            scales = task.token_weights[chunk.tokens], task.real_rows
            grad = gradient(chunk.work, chunk.labels, chunk.maximum, lse, *scales).to(x.dtype)
            del chunk.work
            if grad_x is not None:
                torch.mm(grad, rows, out=grad_x[chunk.start : chunk.start + task.chunk_size])
            if grad_weight is not None:
                _add_product(grad_weight[: task.product_rows], grad, chunk.x)

        before = None
        for start in range(0, len(task.supervised), task.chunk_size):
            tokens = task.supervised[start : start + task.chunk_size]
            chunk = _Chunk(start, tokens, x.index_select(0, tokens), task.labels[tokens])
            chunk.start_maximum(*statistics(chunk.x @ rows.t(), chunk.labels, task.real_rows), task.group)
            if before is not None:
                finish(before)
            chunk.start_sums(task.group)
            if task.pipelined:
                before = chunk
            else:
                finish(chunk)
            del chunk  # before the next one's logits
        if before is not None:
            finish(before)
        ctx.task, ctx.weight, ctx.n_tokens = task, weight, x.shape[0]
        ctx.gradients = grad_x, grad_weight
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward ran before; its gradients are gone")
        (grad_x, grad_weight), ctx.gradients = ctx.gradients, None
        task, weight = ctx.task, ctx.weight
        scale = _upstream_scale(grad_losses, task)
        if grad_x is not None:
            grad_x *= scale
            if task.group is not None and task.sum_input_gradient:
                dist.all_reduce(grad_x, group=task.group)
            whole = grad_x.new_zeros(ctx.n_tokens, grad_x.shape[1])
            grad_x = whole.index_copy_(0, task.supervised, grad_x)
        if task.into_main_grad:
            _require(scale == 1, "into_main_grad needs a loss that is not scaled after the sum")
            weight.grad_added_to_main_grad = True
            # Megatron reads a gradient only as a sign that it exists, unless the weight is tied.
            tied = getattr(weight, "zero_out_wgrad", False)
            grad_weight = torch.zeros_like(weight) if tied else torch.empty_like(weight)
        elif grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(weight.dtype)
        return grad_x, grad_weight, None


class _Chunk:
    """Some supervised tokens on their way: sums over the vocabulary rows of all ranks, without waiting."""

    def __init__(self, start: int, tokens: Tensor, x: Tensor, labels: Tensor) -> None:
        self.start, self.tokens, self.x, self.labels = start, tokens, x, labels

    def start_maximum(
        self, work: Tensor, maximum: Tensor, total: Tensor, target: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        """Takes `_statistics`' results of this rank's rows; begins the MAX."""
        self.work, self.maximum, self._total, self._target = work, maximum, total, target
        self._highest, self._pending = maximum, None
        if group is not None:
            self._highest = maximum.clone()
            self._pending = dist.all_reduce(self._highest, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def start_sums(self, group: dist.ProcessGroup | None) -> None:
        """Ends the MAX; begins the SUM of exponentials above it and of the labels' logits."""
        if group is None:
            return
        assert self._pending is not None, "the MAX of the same group"
        self._pending.wait()
        scale = torch.exp(self.maximum - self._highest)
        self._sums = torch.stack([self._total * scale, self._target])
        self._pending = dist.all_reduce(self._sums, group=group, async_op=True)

    def finish_sums(self) -> tuple[Tensor, Tensor]:
        """Ends the SUM -> lse and label logit, fp32 [c]."""
        if self._pending is None:
            return self.maximum + self._total.log(), self._target
        self._pending.wait()
        return self._highest + self._sums[0].log(), self._sums[1]


def _upstream_scale(grad_losses: Tensor, task: _Task) -> Tensor:
    """The factor s of grad_losses = s * token_weights."""
    weights = task.token_weights
    if not len(task.supervised):
        return weights.new_ones(())
    scale = torch.dot(grad_losses, weights) / torch.dot(weights, weights)
    off = (grad_losses - scale * weights).abs().max() > 1e-4 * (scale * weights).abs().max()
    _require(~off, "its losses must be summed with the token_weights that it was given")
    return scale


def _require(condition: Tensor, rule: str) -> None:
    """Hold to a rule; on a GPU when it gets there, without waiting for it.

    Raises:
        RuntimeError: `condition` does not hold.
    """
    if condition.is_cuda:
        torch._assert_async(condition, f"linear_cross_entropy: {rule}")
    elif not condition:
        raise RuntimeError(f"linear_cross_entropy: {rule}")


def _add_product(total: Tensor, grad: Tensor, chunk: Tensor) -> None:
    """total [V, h] fp32 += grad [c, V]^T @ chunk [c, h], summed in fp32."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.t(), chunk)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), chunk, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(grad.t().float(), chunk.float())


def why_not_fused(device: torch.device) -> str | None:
    """Why the gradient of a bf16 weight cannot be summed in fp32 on `device` as here, or None if it can.

    A product of matrices of a size that no kernel refuses, tried once before the first step.
    """
    grad, chunk = (torch.ones(16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        _add_product(total, grad, chunk)
        if (total == 17).all():
            return None
        reason = "it does not add to what is there"
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
    return f"torch {torch.__version__} does not add a bf16 product to fp32 (addmm with out_dtype): {reason}"


def _statistics(logits: Tensor, labels: Tensor, real_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [c, V], overwritten if fp32 -> (exp(logits - maximum) fp32 [c, V], maximum, its sum over V, the
    label's logit or 0, fp32 [c] each)."""
    work = logits.float()
    mine = (labels >= 0) & (labels < real_rows)
    if not real_rows:
        nothing = work.new_zeros(len(labels))
        return work, nothing - float("inf"), nothing, nothing
    target = work.gather(1, (labels * mine)[:, None]).squeeze(1)
    maximum = work.amax(dim=1)
    work.sub_(maximum[:, None]).exp_()
    return work, maximum, work.sum(dim=1), torch.where(mine, target, 0.0)


def _gradient(
    work: Tensor,
    labels: Tensor,
    maximum: Tensor,
    lse: Tensor,
    token_weights: Tensor,
    real_rows: int,
) -> Tensor:
    """`_statistics`' first result, in place -> weighted gradient of the loss for the logits."""
    work.mul_((torch.exp(maximum - lse) * token_weights)[:, None])
    if real_rows:
        mine = (labels >= 0) & (labels < real_rows)  # no list of them: the host would wait for its length
        tokens = torch.arange(len(labels), device=labels.device)
        work[tokens, labels * mine] -= torch.where(mine, token_weights, 0.0)
    return work


@jit
def statistics_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations
    LOGITS, LABELS, MAXIMUM, TOTAL, TARGET, stride, real_rows, n_columns, BLOCK: tl.constexpr
):
    """One token: maximum and sum of exponentials above it in one pass, and the label's logit or 0.

    Loads are bounded by n_columns, a multiple of 16, so that they can be 128 bits wide.
    """
    token = tl.program_id(0).to(tl.int64)
    LOGITS += token * stride
    maximum = float("-inf")
    total = 0.0
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        x = tl.where(columns < real_rows, x, float("-inf"))
        # A maximum loses NaN: the sum keeps it.
        higher = tl.maximum(maximum, tl.max(x, axis=0))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(x - higher), axis=0)
        maximum = higher
    label = tl.load(LABELS + token)
    mine = (label >= 0) & (label < real_rows)
    target = tl.load(LOGITS + tl.where(mine, label, 0), mask=mine, other=0.0).to(tl.float32)
    tl.store(MAXIMUM + token, maximum)
    tl.store(TOTAL + token, total)
    tl.store(TARGET + token, target)


@jit
def gradient_kernel(LOGITS, LABELS, LSE, WEIGHTS, stride, real_rows, n_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """BLOCK logits of one token become their gradient in place; 0 for padding rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = LOGITS + token * stride + columns
    lse = tl.load(LSE + token)
    weight = tl.load(WEIGHTS + token)
    label = tl.load(LABELS + token)
    mask = columns < n_columns
    x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
    grad = tl.exp(x - lse)
    grad = tl.where(columns == label, grad - 1.0, grad) * weight
    grad = tl.where(columns < real_rows, grad, 0.0)
    tl.store(at, grad.to(LOGITS.dtype.element_ty), mask=mask)


def _triton_statistics(
    logits: Tensor, labels: Tensor, real_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_statistics` on logits that stay as they are."""
    block = configuration(logits.device).cross_entropy
    maximum, total, target = torch.empty(3, len(labels), dtype=torch.float32, device=logits.device)
    statistics_kernel[(len(labels),)](
        logits,
        labels,
        maximum,
        total,
        target,
        logits.stride(0),
        real_rows,
        logits.shape[1],
        BLOCK=block.size,
        num_warps=block.warps,
    )
    return logits, maximum, total, target


def _triton_gradient(
    logits: Tensor,
    labels: Tensor,
    _maximum: Tensor,
    lse: Tensor,
    token_weights: Tensor,
    real_rows: int,
) -> Tensor:
    """`_gradient` on `_triton_statistics`' first result; the maximum is in lse already."""
    (n_tokens, n_columns), block = logits.shape, configuration(logits.device).cross_entropy
    if n_columns:
        gradient_kernel[(n_tokens, triton.cdiv(n_columns, block.size))](
            logits,
            labels,
            lse,
            token_weights,
            logits.stride(0),
            real_rows,
            n_columns,
            BLOCK=block.size,
            num_warps=block.warps,
        )
    return logits

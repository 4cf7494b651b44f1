"""The reference attention backend: plain torch, any device, one segment at a time, softmax in fp32.

Long segments are read in blocks of query rows, so that memory grows with their length and time with its
square. It is the twin against which fast backends are checked, and on a GPU takes the place of none of them
unnoticed: long segments are refused unless it was asked for.
Letters: q query rows, k key rows, g KV heads, r queries per KV head, d head size.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.errors import UserError

BLOCK_SCORES = 2**22  # scores of a head in memory at a time, if a segment has more: 16 MB; larger is slower


def row_blocks(segments: Iterable[Segment], causal: bool) -> Iterator[Segment]:
    """The segments, in their order, the large ones as blocks of their rows; of causal ones with the keys that
    the block's last row sees."""
    for part in segments:
        rows, keys = part.q_end - part.q_start, part.k_end - part.k_start
        block = rows if rows * keys <= BLOCK_SCORES else max(1, BLOCK_SCORES // keys)
        if block == rows:
            yield part
            continue
        for start in range(part.q_start, part.q_end, block):
            end = min(start + block, part.q_end)
            unseen = part.q_end - end if causal else 0
            yield Segment(start, end, part.k_start, part.k_end - unseen)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """q [q, g, r, d], k [k, g, d] -> fp32 [g, r, q, k], minus infinity where a key is hidden."""
    scores = torch.einsum("qgrd,kgd->grqk", q.float(), k.float()) * scale
    if not causal:
        return scores
    rows, keys = q.shape[0], k.shape[0]
    visible = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    return scores.masked_fill(~visible, float("-inf"))


def refuse_long(segments: tuple[Segment, ...], longest: int) -> None:
    """
    Raises:
        UserError: a segment has more keys than `longest`.
    """
    keys = max(part.k_end - part.k_start for part in segments)
    if keys > longest:
        raise UserError(
            f"attention over {keys} keys in plain torch, which is slow, for want of a fast backend: install "
            f"flash-attn, or ask for it with layers.attention reference (limit without asking: {longest})"
        )


class ReferenceAttention:
    """`AttentionBackend` in plain torch.

    Args:
        longest_on_gpu: keys of a segment beyond which a GPU tensor is refused; None: no limit.
    """

    def __init__(self, longest_on_gpu: int | None = None) -> None:
        self.longest_on_gpu = longest_on_gpu

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        if self.longest_on_gpu is not None and q.is_cuda:
            refuse_long(segments, self.longest_on_gpu)
        grouped = q.unflatten(1, (k.shape[1], -1))  # [s, g, r, d]
        out = torch.empty_like(grouped)
        lse = torch.empty((*grouped.shape[1:3], q.shape[0]), dtype=torch.float32, device=q.device)
        for part in row_blocks(segments, causal):
            rows, keys = slice(part.q_start, part.q_end), slice(part.k_start, part.k_end)
            scores = _scores(grouped[rows], k[keys], scale, causal)
            lse[..., rows] = scores.logsumexp(-1)
            weights = torch.exp(scores - lse[..., rows, None])  # without keys: no number, and none are read
            out[rows] = torch.einsum("grqk,kgd->qgrd", weights, v[keys].float()).to(out.dtype)
        return out.flatten(1, 2), lse.flatten(0, 1)

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: tuple[Segment, ...],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = (k.shape[1], -1)
        q_, out_, grad_ = (t.unflatten(1, heads) for t in (q, out, grad_out))
        lse = lse.unflatten(0, heads)
        grad_q = torch.empty_like(q_)
        grad_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        grad_v = torch.zeros_like(grad_k)
        for part in row_blocks(segments, causal):
            rows, keys = slice(part.q_start, part.q_end), slice(part.k_start, part.k_end)
            weights = torch.exp(_scores(q_[rows], k[keys], scale, causal) - lse[..., rows, None])
            grad = grad_[rows].float()
            grad_v[keys] += torch.einsum("grqk,qgrd->kgd", weights, grad)
            grad_weights = torch.einsum("qgrd,kgd->grqk", grad, v[keys].float())
            # Row sums of weights * grad_weights are out . grad_out (the softmax's Jacobian).
            row_sums = (out_[rows].float() * grad).sum(-1).permute(1, 2, 0)
            grad_scores = weights * (grad_weights - row_sums[..., None]) * scale
            grad_q[rows] = torch.einsum("grqk,kgd->qgrd", grad_scores, k[keys].float()).to(grad_q.dtype)
            grad_k[keys] += torch.einsum("grqk,qgrd->kgd", grad_scores, q_[rows].float())
        return grad_q.flatten(1, 2), grad_k, grad_v

"""What an attention backend is: a pair of kernels.

Shapes: s local tokens, np query heads, ng KV heads, d head size, all per tensor parallel rank.
"""

from typing import Protocol

from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment


class AttentionBackend(Protocol):
    """A pair of kernels: bottom-right causal attention over segments, and its gradient.

    Kept apart from autograd so that activation offload can leave core attention out of recomputation.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        """q [s, np, d], k and v [keys, ng, d] -> out [s, np, d] and log-sum-exp fp32 [np, s].

        Segments follow each other without gaps, in queries and in keys: their ends are the cumulative
        lengths of a varlen kernel.
        """

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> grad_q like q; grad_k and grad_v [keys, ng, d], fp32 or the type of k."""

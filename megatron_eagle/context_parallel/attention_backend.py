"""What an attention backend is: a pair of kernels.

Shapes: s local tokens, np query heads, ng KV heads, d head size, all per tensor parallel rank.
"""

from typing import Protocol

from torch import Tensor

from megatron_eagle.context_parallel.layout import Segment


class AttentionBackend(Protocol):
    """A pair of kernels: attention over segments, and its gradient.

    Kept apart from autograd so that activation offload can leave core attention out of recomputation.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """q [s, np, d], k and v [keys, ng, d] -> out [s, np, d] and log-sum-exp fp32 [np, s].

        Segments follow each other without gaps, in queries and in keys: their ends are the cumulative
        lengths of a varlen kernel.

        Args:
            causal: bottom-right causal, as `Segment` says; False: every query sees all keys of its segment,
                of which there may be none. Such queries get out 0 and log-sum-exp minus infinity.
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
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> grad_q like q; grad_k and grad_v [keys, ng, d], fp32 or the type of k.

        With out and log-sum-exp of attention over more keys than these, of which these are a part, the
        gradients are the shares of this part, and sums of shares over all parts are the whole.
        """

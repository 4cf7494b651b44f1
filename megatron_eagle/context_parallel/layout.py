"""Which tokens of a pack each context parallel rank holds, and which keys its queries see.

Host-side integers only. A layout is a list of token ranges per rank; everything that follows the
sequence (ids, labels, weights, positions, visual slots) is indexed with the same list. Labels are
shifted before the split.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Segment:
    """Rows [q_start, q_end) of the local queries attend, bottom-right causal, to keys [k_start, k_end).

    The last query row sees every key of the range, the row before all but the last, and so on. Query
    rows are local, keys are rows of the gathered sequence in natural order.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int


@dataclass(frozen=True)
class SequenceLayout:
    """`ranges[rank]` are that rank's [start, end) token ranges, in the order in which it holds them."""

    length: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def size(self) -> int:
        """Context parallel ranks."""
        return len(self.ranges)

    def token_index(self, rank: int) -> torch.Tensor:
        """Positions in the pack of `rank`'s tokens: int64 [length / size]."""
        return torch.cat([torch.arange(start, end) for start, end in self.ranges[rank]])

    @cached_property
    def natural_order(self) -> torch.Tensor:
        """Row of the rank-major gathered sequence that holds token i: int64 [length]."""
        return torch.argsort(self.rank_major_order)

    @cached_property
    def rank_major_order(self) -> torch.Tensor:
        """Token held by row i of the rank-major gathered sequence: int64 [length]."""
        return torch.cat([self.token_index(rank) for rank in range(self.size)])

    def segments(self, rank: int, document_bounds: Sequence[int]) -> tuple[Segment, ...]:
        """What `rank`'s queries see, one segment per document in each of its ranges.

        Args:
            document_bounds: 0, the ends of all documents but the last, and `length`, ascending.
        """
        segments, row = [], 0
        for start, end in self.ranges[rank]:
            document = bisect_right(document_bounds, start) - 1
            position = start
            while position < end:
                stop = min(document_bounds[document + 1], end)
                segments.append(Segment(row, row + stop - position, document_bounds[document], stop))
                row += stop - position
                position = stop
                document += 1
        return tuple(segments)


def zigzag(length: int, size: int) -> SequenceLayout:
    """The paper's layout: 2 * size equal chunks, rank r holds chunks r and 2 * size - 1 - r.

    For one causal document every rank then has the same attention area.

    Raises:
        UserError: `length` is not a multiple of 2 * size.
    """
    if size == 1:
        return SequenceLayout(length, (((0, length),),))
    if length % (2 * size):
        raise UserError(
            f"a sequence of {length} tokens cannot be cut into 2 x {size} equal chunks for "
            f"context_parallel_size {size}: use a multiple of {2 * size}"
        )
    chunk = length // (2 * size)

    def piece(number: int) -> tuple[int, int]:
        return number * chunk, (number + 1) * chunk

    return SequenceLayout(length, tuple((piece(r), piece(2 * size - 1 - r)) for r in range(size)))

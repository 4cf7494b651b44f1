"""Which tokens of a pack each context parallel rank holds, and which keys its queries see.

Host-side integers only. A layout is a list of token ranges per rank; everything that follows the
sequence (ids, labels, weights, positions, visual slots) is indexed with the same list. Labels are
shifted before the split. Every rank holds the same number of tokens.

This file has the structure and the three fillings that follow a fixed pattern; `balanced.py` has the one
that looks at the work, and `planning.py` chooses among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from megatron_eagle.errors import UserError


class Segment(NamedTuple):
    """Rows [q_start, q_end) of the local queries attend, bottom-right causal, to keys [k_start, k_end).

    The last query row sees every key of the range, the row before all but the last, and so on. Query
    rows are local; what a key row is, the giver of the segment says.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int


def expand(ranges: np.ndarray) -> np.ndarray:
    """int64 [n, 2] of [start, end) -> the integers in them, range after range: int64 [total]."""
    sizes = ranges[:, 1] - ranges[:, 0]
    ends = sizes.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    found: np.ndarray = np.repeat(ranges[:, 0] - (ends - sizes), sizes) + np.arange(total)
    return found


def merge_adjacent(ranges: np.ndarray) -> np.ndarray:
    """Drop empty ranges and join each range that begins where the one before it ends."""
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    new = np.ones(len(ranges), dtype=bool)
    new[1:] = ranges[1:, 0] != ranges[:-1, 1]
    last = np.roll(new, -1)  # the last of a run is followed by a new one, or by nothing
    return np.stack([ranges[new, 0], ranges[last, 1]], axis=1)


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """`ranges[rank]`, int64 [n, 2], are that rank's [start, end) tokens, in the order it holds them."""

    length: int
    ranges: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        """Context parallel ranks."""
        return len(self.ranges)

    def token_index(self, rank: int) -> torch.Tensor:
        """Positions in the pack of `rank`'s tokens: int64 [length / size]."""
        return torch.from_numpy(expand(self.ranges[rank]))

    @cached_property
    def rank_major_order(self) -> torch.Tensor:
        """Token held by row i of the rank-major gathered sequence: int64 [length]."""
        return torch.from_numpy(expand(np.concatenate(self.ranges)))

    def held_before(self, tokens: np.ndarray) -> np.ndarray:
        """Of the tokens before each of `tokens` [n], those that each rank holds: int64 [n, size]."""
        starts, owners, held = self._runs
        run = np.searchsorted(starts, tokens, side="right") - 1
        found: np.ndarray = held[run]
        found[np.arange(len(run)), owners[run]] += tokens - starts[run]
        return found

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ranges in the order of tokens: their starts [n] and ranks [n], and what each rank holds before
        them [n, size]."""
        ranges = np.concatenate(self.ranges)
        order = np.argsort(ranges[:, 0])
        owners = np.repeat(np.arange(self.size), [len(own) for own in self.ranges])[order]
        held = np.zeros((len(ranges) + 1, self.size), dtype=np.int64)
        held[np.arange(1, len(ranges) + 1), owners] = (ranges[:, 1] - ranges[:, 0])[order]
        return ranges[order, 0], owners, held.cumsum(axis=0)[:-1]

    def segment_table(self, rank: int, document_bounds: Sequence[int]) -> np.ndarray:
        """The fields of `segments` as columns: int64 [n, 4]."""
        bounds, ranges = np.asarray(document_bounds), self.ranges[rank]
        first = np.searchsorted(bounds, ranges[:, 0], side="right") - 1
        pieces = np.searchsorted(bounds, ranges[:, 1], side="left") - first
        number = expand(np.stack([first, first + pieces], axis=1))  # document of each piece
        start = np.maximum(np.repeat(ranges[:, 0], pieces), bounds[number])
        end = np.minimum(np.repeat(ranges[:, 1], pieces), bounds[number + 1])
        rows = (end - start).cumsum()
        return np.stack([rows - (end - start), rows, bounds[number], end], axis=1)

    def segments(self, rank: int, document_bounds: Sequence[int]) -> tuple[Segment, ...]:
        """What `rank`'s queries see, one segment per document in each of its ranges; keys are tokens of
        the pack.

        Args:
            document_bounds: 0, the ends of all documents but the last, and `length`, ascending.
        """
        return tuple(Segment(*row) for row in self.segment_table(rank, document_bounds).tolist())

    def cut_each(self, parts: int) -> "SequenceLayout":
        """Cut every rank's list evenly: rank r's tokens go to ranks r * parts, ..., r * parts + parts - 1."""
        if parts == 1:
            return self
        share = self.length // self.size // parts
        cut = []
        for ranges in self.ranges:
            ends = (ranges[:, 1] - ranges[:, 0]).cumsum()
            starts = ends - (ranges[:, 1] - ranges[:, 0])
            for part in range(parts):
                low = np.clip(part * share - starts, 0, ends - starts)
                high = np.clip((part + 1) * share - starts, 0, ends - starts)
                piece = np.stack([ranges[:, 0] + low, ranges[:, 0] + high], axis=1)
                cut.append(piece[piece[:, 1] > piece[:, 0]])
        return SequenceLayout(self.length, tuple(cut))


def contiguous(length: int, size: int) -> SequenceLayout:
    """Rank r holds the r-th of `size` equal runs. The last ranks see the most keys."""
    share = length // size
    return SequenceLayout(length, tuple(np.array([[r * share, (r + 1) * share]]) for r in range(size)))


def zigzag(length: int, size: int) -> SequenceLayout:
    """The paper's layout: 2 * size equal chunks, rank r holds chunks r and 2 * size - 1 - r.

    For one causal document every rank then has the same attention area; documents that end inside the
    pack spoil that.

    Raises:
        UserError: `length` is not a multiple of 2 * size.
    """
    if size == 1:
        return contiguous(length, 1)
    if length % (2 * size):
        raise UserError(
            f"a sequence of {length} tokens cannot be cut into 2 x {size} equal chunks for "
            f"context_parallel_size {size}: use a multiple of {2 * size}"
        )
    return zigzag_per_document(length, size, [0, length])


def zigzag_per_document(length: int, size: int, document_bounds: Sequence[int]) -> SequenceLayout:
    """Zigzag inside every document.

    A document of n tokens is cut into 2 * size chunks of n // (2 * size) tokens, and the n % (2 * size)
    tokens that are left over are dealt out one by one: the next document's dealing goes on with the rank
    where this one's ended, so that all ranks get equally many in a pack of a multiple of `size` tokens.
    """
    bounds = np.asarray(document_bounds)
    sizes = np.diff(bounds)
    chunks = np.repeat((sizes // (2 * size))[:, None], 2 * size, axis=1)
    left_over = sizes % (2 * size)
    dealt_before = left_over.cumsum() - left_over
    ranks = np.arange(size)
    turn = (ranks - dealt_before[:, None]) % size  # rank's place in this document's dealing
    chunks[:, :size] += turn < left_over[:, None]
    chunks[:, size:] += (turn + size < left_over[:, None])[:, ::-1]  # rank r's second chunk
    ends = bounds[:-1, None] + chunks.cumsum(axis=1)
    pieces = np.stack([ends - chunks, ends], axis=2)  # [documents, 2 * size, 2]
    return SequenceLayout(
        length,
        tuple(merge_adjacent(pieces[:, [rank, 2 * size - 1 - rank]].reshape(-1, 2)) for rank in range(size)),
    )

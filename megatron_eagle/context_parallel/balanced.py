"""The layout that looks at the work: equal tokens and nearly equal attention per rank, documents kept close.

Attention's work is the number of query-key pairs (the causal area) and differs from token to token; all
other work is the same for every token, and is counted as so many pairs; so is a key that must come from
another rank. The pack is cut into small chunks and these are handed out from the top down: the ranks are
halved, and one half takes a window of the list of chunks (cyclic, of exactly its number of tokens). Slid
along the list, some window comes within about a chunk of half the work; of all windows the one is taken
that leaves the least work on the busier half, foreign keys included. So short documents stay on one rank,
longer ones inside the smallest halving that balances, and a rank has few runs. PackChunks that are too large
for that to balance are dealt out longest-processing-time first, within the smallest group of ranks that it
helps: the heaviest chunk to the rank that has the least work so far and still has room.

Where ranks are on several nodes, `node_placement.py` divides the pack over those first.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_eagle.context_parallel.layout import SequenceLayout, merge_adjacent

# Beyond this excess of the busiest rank over the mean, longest-processing-time is tried.
TOLERANCE = 0.04


@dataclass(frozen=True)
class PairCosts:
    """What costs time beside attention, in query-key pairs (of a model: `model.flops.pair_costs`)."""

    token: int  # all other work of a token
    key: int  # a key from another rank of the same node
    far_key: int  # a key from another node


def causal_area(tokens: np.ndarray, document_bounds: Sequence[int]) -> np.ndarray:
    """Query-key pairs of all queries before each of `tokens` (0 to the pack's length): int64."""
    bounds = np.asarray(document_bounds)
    sizes = np.diff(bounds)
    whole = np.concatenate([[0], (sizes * (sizes + 1) // 2).cumsum()])
    document = np.minimum(np.searchsorted(bounds, tokens, side="right") - 1, len(sizes) - 1)
    inside = tokens - bounds[document]
    pairs: np.ndarray = whole[document] + inside * (inside + 1) // 2
    return pairs


def balanced(
    length: int, size: int, document_bounds: Sequence[int], chunk_size: int, costs: PairCosts
) -> SequenceLayout:
    """Place chunks of `chunk_size` tokens so that every rank has the same work and few foreign keys.

    Args:
        chunk_size: divides length / size. Smaller: better balance, same number of runs.
    """
    pack = PackChunks.of(length, size, document_bounds, chunk_size, costs)
    return pack.layout(pack.bisect(np.arange(len(pack.work)), size))


@dataclass(frozen=True, eq=False)
class PackChunks:
    """A pack in chunks of equal size."""

    starts: np.ndarray  # int [chunks + 1]: first token of each, and the pack's length
    document: np.ndarray  # int [chunks]: of the first token of each
    foreign: np.ndarray  # int [chunks]: keys that each needs from others if parted from the one before it
    work: np.ndarray  # int [chunks], in query-key pairs
    costs: PairCosts
    limit: float  # more work no rank should have

    @classmethod
    def of(
        cls, length: int, size: int, document_bounds: Sequence[int], chunk_size: int, costs: PairCosts
    ) -> "PackChunks":
        """Cut a pack for `size` ranks."""
        starts, bounds = np.arange(0, length + 1, chunk_size), np.asarray(document_bounds)
        document = np.searchsorted(bounds, starts[:-1], side="right") - 1
        work = np.diff(causal_area(starts, document_bounds)) + costs.token * chunk_size
        limit = work.sum() / size * (1 + TOLERANCE)
        return cls(starts, document, starts[:-1] - bounds[document], work, costs, limit)

    def layout(self, placed: Sequence[np.ndarray]) -> SequenceLayout:
        """That in which each rank holds the chunks [n] (ascending) of its place."""
        ranges = (np.stack([self.starts[held], self.starts[held + 1]], axis=1) for held in placed)
        return SequenceLayout(int(self.starts[-1]), tuple(merge_adjacent(own) for own in ranges))

    def heaviest(self, placed: Sequence[np.ndarray]) -> int:
        """The work of the busiest rank."""
        return max(int(self.work[held].sum()) for held in placed)

    def bisect(self, chunks: np.ndarray, size: int) -> list[np.ndarray]:
        """Divide `chunks` (ascending) over `size` ranks of which none should have more than the limit."""
        if size == 1:
            return [chunks]
        halves = self.halve(chunks, size, size // 2, self.costs.key)
        placed = [held for part, ranks in halves for held in self.bisect(part, ranks)]
        heaviest = self.heaviest(placed)
        if heaviest > self.limit:
            dealt = _longest_processing_time(chunks, size, self.work[chunks])
            if self.heaviest(dealt) < heaviest:
                return dealt
        return placed

    def halve(self, chunks: np.ndarray, size: int, half: int, key: int) -> list[tuple[np.ndarray, int]]:
        """The best window of a list of chunks for `half` of `size` ranks or nodes: both parts, and how many
        have each, the one with the first token first.

        Args:
            key: what one more foreign key costs.
        """
        count, width = len(chunks), len(chunks) // size * half
        own = self.work[chunks]
        sums = np.concatenate([[0], own, own]).cumsum()
        window = sums[width : width + count] - sums[:count]
        busier = np.maximum(window / half, (sums[count] - window) / (size - half))
        # Where neighbours in the list are not neighbours in the pack, the cut costs nothing more.
        cut = key * self.foreign[chunks] * (np.diff(chunks, prepend=-2) == 1)
        first = int(np.argmin(busier + cut + np.roll(cut, -width)))
        inside = np.zeros(count, dtype=bool)
        inside[np.arange(first, first + width) % count] = True
        halves = [(chunks[inside], half), (chunks[~inside], size - half)]
        # Neighbouring ranks hold neighbouring tokens.
        return sorted(halves, key=lambda part: int(part[0].min()))


def _longest_processing_time(chunks: np.ndarray, size: int, work: np.ndarray) -> list[np.ndarray]:
    """Heaviest chunk first, each to the least loaded rank that has room; ties by number."""
    room = len(chunks) // size
    ranks = [(0, rank) for rank in range(size)]
    held: list[list[int]] = [[] for _ in range(size)]
    for place in np.argsort(-work, kind="stable").tolist():
        load, rank = heapq.heappop(ranks)
        held[rank].append(place)
        if len(held[rank]) < room:
            heapq.heappush(ranks, (load + int(work[place]), rank))
    return [chunks[np.sort(own)] for own in held]

"""Exact search for the most similar row, in bounded memory: block by block, whatever the number of rows.

Rows have length 1, so a product is a cosine.  Shapes: q candidate rows, e existing rows, d feature length.
With blocks of Q and E rows the largest arrays are [Q, d], [E, d] and [Q, E]; the existing rows are read from
disk ceil(q / Q) times.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Blocks:
    """Rows of candidates and of existing features in one product; the defaults hold 0.7 GB at d 1152."""

    candidates: int = 32768
    existing: int = 4096

    def memory(self, dim: int) -> int:
        """Bytes that a search holds at its fullest, for features of length `dim`."""
        return 4 * ((self.candidates + self.existing) * dim + self.candidates * self.existing)


def highest_cosine(
    candidates: np.ndarray,
    existing: Sequence[np.ndarray],
    blocks: Blocks = Blocks(),
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """For each candidate the highest cosine to any row of all `existing` arrays.

    Args:
        candidates: float32 [q, d].
        existing: float32 [n, d] each.

    Returns:
        The cosines, float32 [q], and the numbers of those rows, int64 [q], counted over all arrays (the first
        of several with the same product); -2 and -1 if there are no existing rows.
    """
    cosine = np.full(len(candidates), -2, np.float32)
    nearest = np.full(len(candidates), -1, np.int64)
    for begin in range(0, len(candidates), blocks.candidates):
        rows = slice(begin, begin + blocks.candidates)
        query = _load(candidates[rows], device)
        best = torch.full((len(query),), -2.0, device=device)
        where = torch.full((len(query),), -1, dtype=torch.int64, device=device)
        for offset, block in _each_block(existing, blocks.existing):
            product = query @ _load(block, device).T  # [Q, E]
            index = product.argmax(dim=1)
            value = product.gather(1, index[:, None])[:, 0]
            better = value > best
            best = torch.where(better, value, best)
            where = torch.where(better, index + offset, where)
        cosine[rows], nearest[rows] = best.cpu().numpy(), where.cpu().numpy()
    return cosine, nearest


def greedy_distinct(
    shards: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    tau: float,
    blocks: Blocks = Blocks(),
    device: str | torch.device = "cpu",
) -> list[np.ndarray]:
    """Take rows in order, each only if its cosine to every row taken before is below `tau`.

    Memory is that of `highest_cosine` with two blocks of the smaller kind.

    Args:
        shards: float32 [n, d] each.
        wanted: bool [n] each, the rows that are considered.

    Returns:
        Those taken, as `wanted`.
    """
    size = min(blocks.candidates, blocks.existing)
    taken = [np.zeros(len(shard), bool) for shard in shards]
    for number, (shard, considered) in enumerate(zip(shards, wanted, strict=True)):
        rows = np.flatnonzero(considered)
        for begin in range(0, len(rows), size):
            some = rows[begin : begin + size]
            block = np.ascontiguousarray(shard[some])
            free = np.ones(len(some), bool)
            for earlier, kept in zip(shards[: number + 1], taken, strict=False):
                for gathered in _gather(earlier, np.flatnonzero(kept), size):
                    free &= highest_cosine(block, [gathered], Blocks(size, size), device)[0] < tau
            query = _load(block, device)
            close = (query @ query.T >= tau).cpu().numpy()
            for i in np.flatnonzero(free):
                if not (close[i, :i] & free[:i]).any():
                    continue
                free[i] = False
            taken[number][some[free]] = True
    return taken


def _gather(shard: np.ndarray, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for i in range(0, len(rows), size):
        yield shard[rows[i : i + size]]


def _each_block(arrays: Iterable[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of at most `size` rows with the number of their first row over all arrays."""
    offset = 0
    for array in arrays:
        for i in range(0, len(array), size):
            yield offset + i, array[i : i + size]
        offset += len(array)


def _load(rows: np.ndarray, device: str | torch.device) -> torch.Tensor:
    # A copy: the rows of a read-only memory map leave the page cache again when the block is done.
    return torch.from_numpy(np.array(rows, np.float32)).to(device)

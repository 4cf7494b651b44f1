"""Grouping rows into packs that are full and alike: long rows are dealt out, short ones fill what is left.

Dealing balances cost: rows go from the longest to the shortest in strata of one row per pack, so that every
pack gets its share of long and short ones; within a stratum the packs that have the least attention and the
fewest tiles so far get the rows with the most.  Best fit makes packs full: the last few rows of every pack
go from the longest to the shortest, each into the pack that it fills best.  All packs of equal room are
alike, so packs are kept in stacks by room, and a tree over the rooms finds the smallest that is large enough
in a few steps: the time grows with the number of rows and hardly with anything else.  In the end rows of
equal length change places, which evens out the tiles and touches nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_eagle.errors import UserError

# Rows per pack that are left for best fit: as few as still give full packs.  None leaves all of them.
_FILLERS = (3, 6, 12, None)
_TOLERANCE = 1.001  # packs over the least possible number, beyond which more rows are left for best fit


@dataclass(frozen=True)
class Packing:
    """Rows grouped into packs: pack i holds `rows[starts[i] : starts[i + 1]]`.

    `rows` int64 [n] names every row once, `starts` int64 [packs + 1].
    """

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        if not 0 <= pack < len(self):
            raise IndexError(f"pack {pack} of {len(self)}")
        return self.rows[self.starts[pack] : self.starts[pack + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum over each pack of one value per row, in the type of `values`."""
        return np.add.reduceat(values[self.rows], self.starts[:-1]) if len(self) else values[:0]


def pack_rows(
    lengths: np.ndarray, capacity: int, seed: int | Sequence[int], *, tiles: np.ndarray | None = None
) -> Packing:
    """Group rows into packs of at most `capacity` tokens.

    Every row is in exactly one pack.  Packs are full first, then alike in their sum of squared lengths and in
    their tiles.

    Args:
        lengths: tokens of each row, integers [n].
        seed: which of the rows of equal length goes where, the order of the packs and that of the rows in
            each.
        tiles: vision tiles of each row, integers [n]; None: it has none.

    Raises:
        UserError: a row longer than a pack.
    """
    n = len(lengths)
    if n and lengths[longest := int(np.argmax(lengths))] > capacity:
        raise UserError(f"row {longest} has {lengths[longest]} tokens, more than a pack of {capacity}")
    tiles = np.zeros(n, np.int64) if tiles is None else tiles
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(n)
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    sorted_lengths = lengths[order].astype(np.int64)
    least = -(-int(sorted_lengths.sum()) // capacity)
    pack_of, n_packs = np.zeros(0, np.int64), n + 1
    for fillers in _FILLERS:
        found = _deal_and_fill(sorted_lengths, tiles[order], capacity, least, fillers)
        if found[1] < n_packs:
            pack_of, n_packs = found
        if n_packs <= _TOLERANCE * least + 1:
            break
    _even_tiles(sorted_lengths, tiles[order], pack_of, n_packs)
    # Packs in random order, and their rows too: rows in random order first, then gathered by pack.
    pack_of = generator.permutation(n_packs)[pack_of]
    mix = generator.permutation(n)
    by_pack = mix[np.argsort(pack_of[mix], kind="stable")]
    starts = np.zeros(n_packs + 1, np.int64)
    np.cumsum(np.bincount(pack_of, minlength=n_packs), out=starts[1:])
    return Packing(order[by_pack], starts)


def _deal_and_fill(
    lengths: np.ndarray, tiles: np.ndarray, capacity: int, least: int, fillers: int | None
) -> tuple[np.ndarray, int]:
    """The pack of each row, and the number of packs; rows in descending order of length.

    Deals to `least` packs until `fillers` rows per pack are left; None deals nothing.
    """
    n = len(lengths)
    n_packs = least if fillers is not None else 0
    pack_of = np.full(n, -1, np.int64)
    tokens = np.zeros(n_packs, np.int64)
    squares = np.zeros(n_packs, np.int64)
    visual = np.zeros(n_packs, np.int64)
    # Two keys at once: packs are cut into groups by their squares, and sorted by their tiles within each.
    # Few groups: the rows of one stratum are nearly equal in length, so squares are nearly balanced already.
    groups = np.arange(n_packs) // max(1, round(n_packs**0.75))
    for stratum in range(n // n_packs - fillers if n_packs and fillers is not None else 0):
        rows = np.arange(stratum * n_packs, (stratum + 1) * n_packs)
        lightest = np.argsort(squares, kind="stable")
        packs = lightest[np.lexsort((-visual[lightest], groups))]
        rows = rows[np.lexsort((tiles[rows], groups))]
        fits = tokens[packs] + lengths[rows] <= capacity
        rows, packs = rows[fits], packs[fits]
        pack_of[rows] = packs
        tokens[packs] += lengths[rows]
        squares[packs] += lengths[rows] ** 2
        visual[packs] += tiles[rows]
    left = np.flatnonzero(pack_of < 0)
    return pack_of, _best_fit(lengths, left, pack_of, capacity - tokens, capacity)


def _best_fit(
    lengths: np.ndarray, rows: np.ndarray, pack_of: np.ndarray, room: np.ndarray, capacity: int
) -> int:
    """Write the pack of each of `rows`, which come in descending order of length, into `pack_of`.

    `room` is what is left in the packs that exist; more are opened as needed.  Returns how many there are.
    """
    rooms = _Bins(capacity)
    for pack, left in enumerate(room.tolist()):
        rooms.put(pack, left)
    n_packs = len(room)
    chosen = []
    for length in lengths[rows].tolist():
        found = rooms.take(length)
        if found is None:
            found = n_packs, capacity
            n_packs += 1
        pack, left = found
        chosen.append(pack)
        rooms.put(pack, left - length)
    pack_of[rows] = chosen
    return n_packs


def _even_tiles(lengths: np.ndarray, tiles: np.ndarray, pack_of: np.ndarray, n_packs: int) -> None:
    """Exchange rows of equal length so that packs with few tiles get those with many; changes `pack_of`."""
    visual = np.bincount(pack_of, tiles, n_packs).astype(np.int64)
    bounds = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)).tolist()
    for begin, end in zip(bounds, bounds[1:], strict=False):
        own = tiles[begin:end]
        if end - begin > 1 and own.min() < own.max():
            packs = pack_of[begin:end]
            np.subtract.at(visual, packs, own)
            packs = packs[np.argsort(visual[packs], kind="stable")]
            most_first = np.argsort(-own, kind="stable")
            pack_of[begin + most_first] = packs
            np.add.at(visual, packs, own[most_first])


class _Bins:
    """Open packs by the room they have left (0 .. capacity).

    The set of rooms that occur is a bit set of two levels of Python integers, 256 rooms per word: the
    smallest room not below a length is the lowest set bit after a shift.
    """

    def __init__(self, capacity: int):
        self._stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._words = [0] * ((capacity >> 8) + 1)
        self._top = 0  # bit w is set if word w is not empty

    def put(self, pack: int, room: int) -> None:
        """Add an open pack; one without room is full and forgotten."""
        if room == 0:
            return
        self._stacks[room].append(pack)
        self._words[room >> 8] |= 1 << (room & 255)
        self._top |= 1 << (room >> 8)

    def take(self, length: int) -> tuple[int, int] | None:
        """Remove and return a pack with the smallest room >= length, and that room; None if there is none."""
        word, bit = length >> 8, length & 255
        bits = self._words[word] >> bit
        if bits:
            room = length + (bits & -bits).bit_length() - 1
        else:
            above = self._top >> (word + 1)
            if not above:
                return None
            word += (above & -above).bit_length()
            bits = self._words[word]
            room = (word << 8) + (bits & -bits).bit_length() - 1
        stack = self._stacks[room]
        pack = stack.pop()
        if not stack:
            self._words[room >> 8] &= ~(1 << (room & 255))
            if not self._words[room >> 8]:
                self._top &= ~(1 << (room >> 8))
        return pack, room

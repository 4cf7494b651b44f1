"""Packs of a store that may still be growing, in an order that does not depend on how far it has grown.

Window w is the shards w * k to (w + 1) * k - 1. A run visits window 0, 1, ... to the last one, and begins
again: visit v is window v modulo their number, in epoch v // their number. Each is packed by itself, and its
packs come in an order that follows from (seed, epoch, window). So pack number p of the run depends on the
windows up to its own, never on a later one, and the whole state is still the number of packs consumed.
"""

import hashlib
import time
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Annotated

import numpy as np

from megatron_eagle.data.packing.windows import Window, n_windows, open_window, shards_of
from megatron_eagle.data.store.shards import ShardStore
from megatron_eagle.errors import UserError
from megatron_eagle.ranges import Range, Ranged

LOOK_SECONDS = 1.0  # between two looks for a window that is not there
_LOOKS = 10  # for one that was there: a store in the place of another is, for a moment, at neither


@dataclass
class FollowConfig(Ranged):
    """Training on a store that `preprocess run --follow` makes, while it is made.

    A window of `shards_per_window` shards is packed by itself; training waits for the next one, and ends with
    an error if preprocessing has given no sign of life for `dead_after_minutes`. The same setting gives the
    same batches once the store is complete.
    """

    shards_per_window: Annotated[int, Range(1, 10**6)]
    dead_after_minutes: Annotated[float, Range(0.01, 100_000)] = 10.0


@dataclass(frozen=True)
class Read:
    """What a batch was read from. `window_start` is the number of the first pack of visit `window`, to which
    the batch's first pack belongs; the beginnings of SHA-256 stand for all rows and tokens up to the end of
    its last window, and for the packs of its windows."""

    window: int
    window_start: int
    store: str
    packs: str


class FollowedPacks:
    """The packs of a run by their number, as `PackIndex` has them, of the windows that are there.

    Safe in several threads.

    Raises:
        UserError: a store without any line.
    """

    def __init__(self, store: ShardStore, config: FollowConfig, seed: int):
        self._store, self._size, self._seed = store, config.shards_per_window, seed
        self._n_windows = n_windows(store, self._size)
        if not self._n_windows:
            raise UserError(f"{store.place}: its recipe has no line")
        self._lock = RLock()
        self._first_visit = 0
        self._starts = [0]  # of the visits from `_first_visit` on, and the end of the last one
        self._digest: str | None = ""  # of what was read before the next visit; None: it was read elsewhere
        self._looked = -LOOK_SECONDS
        self._windows = lru_cache(maxsize=4)(self._open)
        self._orders = lru_cache(maxsize=4)(self._permute)
        self._before: tuple[int, int, Read] | None = None

    def __len__(self) -> int:
        """Packs of the run up to the end of the last window that was found."""
        return self._starts[-1]

    def reach(self, end: int) -> bool:
        """Whether the packs before number `end` are there; looks for more if they are not.

        Raises:
            UserError: a store that was changed, or in which every line was dropped.
        """
        with self._lock:
            while self._starts[-1] < end:
                if time.monotonic() - self._looked < LOOK_SECONDS:
                    return False
                if not self._next():
                    self._looked = time.monotonic()
                    return False
            return True

    def awaited(self) -> str:
        """The next window, in words."""
        window = (self._first_visit + len(self._starts) - 1) % self._n_windows
        first, last = shards_of(self._store, self._size, window)
        there = min(max(self._store.shards_there - first, 0), last - first)
        return (
            f"window {window + 1} of {self._n_windows} of {self._store.place} ({there} of its {last - first} "
            "shards are there)"
        )

    def go_on(self, read: Read, first: int, last: int) -> None:
        """Begin at the window of a batch, packs `first` to `last`, that was read before.

        That it still is the same is looked at when it is there.
        """
        with self._lock:
            self._first_visit, self._starts, self._digest = read.window, [read.window_start], None
            self._before = first, last, read

    def read(self, first: int, last: int) -> Read:
        """What packs `first` to `last` are read from."""
        (begin, start), (end, _) = self._visit(first), self._visit(last)
        windows = [self._windows(visit % self._n_windows) for visit in range(begin, end + 1)]
        packs = hashlib.sha256("".join(window.packs_digest for window in windows).encode())
        return Read(begin, start, self._digest_after(end)[:16], packs.hexdigest()[:16])

    def rows(self, pack: int) -> list[int]:
        """Store rows of a pack, in their order within it."""
        visit, start = self._visit(pack)
        window = self._windows(visit % self._n_windows)
        return window.packs.rows(int(self._orders(visit)[pack - start]))

    def column(self, name: str, packs: np.ndarray) -> np.ndarray:
        """Values of one numeric column for some packs."""
        visits = np.array([self._visit(pack)[0] for pack in packs.tolist()], np.int64)
        values: dict[int, np.ndarray] = {}
        for visit in dict.fromkeys(visits.tolist()):
            places = np.flatnonzero(visits == visit)
            start = self._visit(int(packs[places[0]]))[1]
            own = self._orders(visit)[packs[places] - start]
            found = self._windows(visit % self._n_windows).packs.column(name, own)
            values |= zip(places.tolist(), found, strict=True)
        return np.array([values[i] for i in range(len(packs))])

    def _visit(self, pack: int) -> tuple[int, int]:
        """The visit that a pack belongs to, and the number of its first pack."""
        with self._lock:
            i = bisect_right(self._starts, pack) - 1
            if i < 0 or pack >= self._starts[-1]:
                raise IndexError(f"pack {pack} is not among {self._starts[0]} to {self._starts[-1] - 1}")
            return self._first_visit + i, self._starts[i]

    def _next(self) -> bool:
        """Find the window of the next visit; whether it is there."""
        known = len(self._starts) - 1
        visit = self._first_visit + known
        if known >= self._n_windows and self._starts[-1 - self._n_windows] == self._starts[-1]:
            raise UserError(
                f"{self._store.place} holds no sample at length {self._store.length}; see its dropped.jsonl"
            )
        number = visit % self._n_windows
        whole = self._store.n_shards
        needed = shards_of(self._store, self._size, number) if visit < self._n_windows else (whole - 1, whole)
        if self._store.heads(*needed) is None:
            return False
        window = self._windows(number)
        before = window.previous if visit < self._n_windows else self._digest_after(visit)
        if self._digest not in (None, before):
            raise UserError(self._store.changed(f"window {number + 1} does not follow from what was read"))
        self._digest = self._digest_after(visit)
        self._starts.append(self._starts[-1] + len(window.packs))
        self._compare()
        return True

    def _compare(self) -> None:
        """Whether what was read before, elsewhere, would be read again."""
        if self._before is None or self._before[1] >= self._starts[-1]:
            return
        first, last, then = self._before
        if self.read(first, last) != then:
            raise UserError(
                self._store.changed(f"packs {first} to {last} are not those that this run has read")
            )
        self._before = None

    def _digest_after(self, visit: int) -> str:
        """Of the window's end in the first epoch, later of the whole store."""
        if visit < self._n_windows:
            return self._windows(visit).digest
        whole = self._store.n_shards
        heads = self._store.heads(whole - 1, whole)
        assert heads, "an epoch after the first begins when all shards are there"
        return heads[0].digest

    def _open(self, number: int) -> Window:
        for _ in range(_LOOKS):
            window = open_window(self._store, self._size, number, self._seed)
            if window is not None:
                return window
            time.sleep(LOOK_SECONDS)
        raise UserError(self._store.changed(f"window {number + 1} is gone"))

    def _permute(self, visit: int) -> np.ndarray:
        epoch, number = divmod(visit, self._n_windows)
        count = len(self._windows(number).packs)
        return np.random.default_rng([self._seed, epoch, number]).permutation(count)

"""The packs of a window: some shards of a store that training may follow, packed by themselves.

Every rank makes them in memory, the same everywhere, so that nothing is written into a store that somebody
else is making, and no rank waits for another.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_eagle.data.packing.index import PACKED_COLUMNS, PackIndex, pack_table
from megatron_eagle.data.store.shards import ShardStore


@dataclass(frozen=True)
class Window:
    """`previous` and `digest` stand for all rows and tokens before it, and up to its end."""

    number: int
    packs: PackIndex
    previous: str
    digest: str

    @cached_property
    def packs_digest(self) -> str:
        """SHA-256 of the rows of every pack."""
        rows = self.packs.table["rows"].combine_chunks()
        found = hashlib.sha256(np.asarray(rows.offsets).tobytes())
        found.update(np.asarray(rows.values).tobytes())
        return found.hexdigest()


def shards_of(store: ShardStore, shards_per_window: int, number: int) -> tuple[int, int]:
    """The first shard of a window, and the one behind its last."""
    first = number * shards_per_window
    return first, min(first + shards_per_window, store.n_shards)


def n_windows(store: ShardStore, shards_per_window: int) -> int:
    """Of the complete store."""
    return -(-store.n_shards // shards_per_window)


def open_window(store: ShardStore, shards_per_window: int, number: int, seed: int) -> Window | None:
    """Pack a window; None: it is not there yet. A window whose lines were all dropped has no packs.

    Args:
        seed: with the window's number, as in `pack_rows`.
    Raises:
        UserError: a store that was changed.
    """
    first, last = shards_of(store, shards_per_window, number)
    heads = store.heads(first, last)
    if heads is None:
        return None
    columns = store.columns(PACKED_COLUMNS, first, last)
    table = pack_table(columns, store.length, [seed, number], heads[0].first_row)
    return Window(number, PackIndex(table), heads[0].previous, heads[-1].digest)

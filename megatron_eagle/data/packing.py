"""Packs: rows of one length grouped so that a training sequence is full, written as a small index.

Best fit decreasing: rows go from the longest to the shortest, each into the pack that it fills best.  All
packs of equal room are alike, so packs are kept in stacks by room, and a tree over the rooms finds the
smallest that is large enough in a few steps: the cost grows with the number of rows and hardly with anything
else.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_eagle.data.store import SampleStore
from megatron_eagle.errors import UserError

_SCHEMA = pa.schema(
    {
        "rows": pa.list_(pa.int64()),
        **dict.fromkeys(("n_samples", "n_tokens", "n_tiles", "n_supervised", "n_answers"), pa.int64()),
        **dict.fromkeys(("sum_sqrt", "sum_sqrt_per_answer"), pa.float64()),
    }
)


def pack_rows(lengths: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Group rows into packs of at most `capacity` tokens.

    Every row is in exactly one pack.  Rows of equal length are interchangeable: the seed decides which goes
    where, the order of the packs and of the rows within each.  Raises `UserError` for a row longer than a
    pack.
    """
    if len(lengths) and (longest := int(np.argmax(lengths))) >= 0 and lengths[longest] > capacity:
        raise UserError(f"row {longest} has {lengths[longest]} tokens, more than a pack of {capacity}")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    order = shuffled[np.argsort(lengths[shuffled], kind="stable")[::-1]]
    pack_of = _best_fit(lengths[order].tolist(), capacity)
    # Rows in random order, then gathered by pack: the order within a pack is random, too.
    mix = generator.permutation(len(order))
    by_pack = mix[np.argsort(pack_of[mix], kind="stable")]
    packs = np.split(order[by_pack], np.cumsum(np.bincount(pack_of))[:-1]) if len(order) else []
    return [packs[i] for i in generator.permutation(len(packs))]


def _best_fit(lengths: list[int], capacity: int) -> np.ndarray:
    """The pack of each row, for rows in descending order."""
    rooms = _Rooms(capacity)
    pack_of = np.empty(len(lengths), np.int64)
    n_packs = 0
    for i, length in enumerate(lengths):
        found = rooms.take(length)
        if found is None:
            pack, room = n_packs, capacity
            n_packs += 1
        else:
            pack, room = found
        pack_of[i] = pack
        rooms.put(pack, room - length)
    return pack_of


class _Rooms:
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


@dataclass(frozen=True)
class PackReport:
    """What packing did: rows, packs, the share of their tokens that are used, seconds."""

    n_rows: int
    n_packs: int
    fill: float
    seconds: float


def write_packs(data: str | Path, length: int, seed: int) -> PackReport:
    """Pack the rows of one length and write `data`/<length>/packs.arrow.

    The index also holds per pack what the loss normaliser needs: the sums over its samples of n, of sqrt(n),
    and of sqrt(n) per answer, n being supervised tokens.  Raises `UserError`.
    """
    start = time.perf_counter()
    store = SampleStore(data, length)
    if not len(store):
        raise UserError(f"{data} holds no sample at length {length}; see {data}/dropped.jsonl")
    lengths = np.asarray(store.column("n_tokens"))
    packs = pack_rows(lengths, length, seed)
    order = np.concatenate(packs)
    starts = np.cumsum([0, *map(len, packs)])

    def per_pack(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values[order], starts[:-1])

    supervised = np.asarray(store.column("n_supervised"))
    n_answers, sqrt_per_answer = _per_answer(store)
    table = pa.table(
        {
            "rows": pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(order)),
            "n_samples": np.diff(starts),
            "n_tokens": per_pack(lengths.astype(np.int64)),
            "n_tiles": per_pack(np.asarray(store.column("n_tiles")).astype(np.int64)),
            "n_supervised": per_pack(supervised.astype(np.int64)),
            "n_answers": per_pack(n_answers),
            "sum_sqrt": per_pack(np.sqrt(supervised.astype(np.float64))),
            "sum_sqrt_per_answer": per_pack(sqrt_per_answer),
        },
        schema=_SCHEMA.with_metadata(
            {"seed": str(seed), "length": str(length), "store": store_identity(store)}
        ),
    )
    path = store.folder / "packs.arrow"
    partial = path.with_suffix(".partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    partial.replace(path)
    fill = lengths.sum() / (len(packs) * length)
    return PackReport(len(store), len(packs), float(fill), time.perf_counter() - start)


def _per_answer(store: SampleStore) -> tuple[np.ndarray, np.ndarray]:
    """Per row: the number of answers, and the sum of the square roots of their lengths."""
    column = store.column("answer_lengths").combine_chunks()
    offsets = np.asarray(column.offsets)
    sums = np.concatenate([[0.0], np.cumsum(np.sqrt(np.asarray(column.values, np.float64)))])
    return np.diff(offsets).astype(np.int64), sums[offsets[1:]] - sums[offsets[:-1]]


def store_identity(store: SampleStore) -> str:
    """What an index was made for: the hash of the rows it numbers."""
    return store.manifest.files[f"{store.length}/samples.arrow"]["sha256"]


@dataclass(frozen=True)
class PackIndex:
    """A pack index read back: the rows of each pack, and the columns of packs.arrow as arrays."""

    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, pack: int) -> list[int]:
        """Store rows of a pack, in their order within it."""
        return self.table["rows"][pack].as_py()

    def column(self, name: str, packs: np.ndarray) -> np.ndarray:
        """Values of one numeric column for some packs."""
        return np.asarray(self.table[name].take(pa.array(packs)))


def read_packs(store: SampleStore) -> PackIndex:
    """Read the pack index of a store's length.

    Raises `UserError` if there is none, or if it was made for another length or for other rows.
    """
    again = f"run pack_data --data {store.path} --length {store.length}"
    path = store.folder / "packs.arrow"
    if not path.is_file():
        raise UserError(f"{store.path} has no packs for length {store.length}; {again}")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        raise UserError(f"{path} cannot be read; {again}") from None
    made_for = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if made_for.get("length") != str(store.length) or made_for.get("store") != store_identity(store):
        raise UserError(f"{path} was made for other data; {again}")
    return PackIndex(table)

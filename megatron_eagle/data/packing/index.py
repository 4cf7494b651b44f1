"""The pack index: which rows of one length make up each training sequence, and what the loader must know of
each without reading it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from megatron_eagle.data.packing.balance import pack_costs
from megatron_eagle.data.packing.best_fit import pack_rows
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.files import beside

_SCHEMA = pa.schema(
    {
        "rows": pa.large_list(pa.int64()),
        **dict.fromkeys(("n_samples", "n_tokens", "n_tiles", "n_supervised", "n_answers"), pa.int64()),
        "sum_squares": pa.int64(),
        **dict.fromkeys(("sum_sqrt", "sum_sqrt_per_answer"), pa.float64()),
    }
)

PACKED_COLUMNS = ("n_tokens", "n_tiles", "n_supervised", "answer_lengths")
"""Those of the samples that packing needs."""


@dataclass(frozen=True)
class PackReport:
    """What packing did: rows, packs, the share of their tokens that are used, seconds.

    `cost_spread` says how much the costs of packs differ (see `balance`): standard deviation over mean.
    """

    n_rows: int
    n_packs: int
    fill: float
    cost_spread: float
    seconds: float


def write_packs(data: str | Path, length: int, seed: int, patch_cost: float = 0.0) -> PackReport:
    """Pack the rows of one length and write `data`/<length>/packs.arrow.

    The index also holds per pack what the loss normaliser needs (the sums over its samples of n, of sqrt(n),
    and of sqrt(n) per answer, n being supervised tokens) and what balancing needs (tiles, the sum of squared
    lengths).

    Args:
        patch_cost: for the report alone, as in `balance`; 0: of attention.

    Raises:
        UserError: nothing to pack, or the index cannot be written.
    """
    start = time.perf_counter()
    store = SampleStore(data, length)
    if not len(store):
        raise UserError(f"{data} holds no sample at length {length}; see {data}/dropped.jsonl")
    columns = pa.table({name: store.column(name) for name in PACKED_COLUMNS})
    table = pack_table(columns, length, seed).replace_schema_metadata(
        {"seed": str(seed), "length": str(length), "store": store_identity(store)}
    )
    path = store.folder / "packs.arrow"
    try:
        with (
            beside(path) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as out,
        ):
            out.write_table(table)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    tokens, tiles, squares = (np.asarray(table[name]) for name in ("n_tokens", "n_tiles", "sum_squares"))
    costs = pack_costs(squares, tiles * store.manifest.patches_per_tile, patch_cost)
    return PackReport(
        n_rows=len(store),
        n_packs=len(table),
        fill=float(tokens.sum() / (len(table) * length)),
        cost_spread=float(costs.std() / costs.mean()),
        seconds=time.perf_counter() - start,
    )


def pack_table(columns: pa.Table, length: int, seed: int | Sequence[int], first_row: int = 0) -> pa.Table:
    """The index of the packs that some rows are grouped into.

    Args:
        columns: `PACKED_COLUMNS` of the rows.
        length: tokens of a pack.
        first_row: number of the first of the rows.
    """
    lengths, tiles, supervised = (
        np.asarray(columns[name]).astype(np.int64) for name in ("n_tokens", "n_tiles", "n_supervised")
    )
    packs = pack_rows(lengths, length, seed, tiles=tiles)
    n_answers, sqrt_per_answer = _per_answer(columns["answer_lengths"])
    return pa.table(
        {
            "rows": pa.LargeListArray.from_arrays(pa.array(packs.starts), pa.array(packs.rows + first_row)),
            "n_samples": np.diff(packs.starts),
            "n_tokens": packs.sums(lengths),
            "n_tiles": packs.sums(tiles),
            "n_supervised": packs.sums(supervised),
            "n_answers": packs.sums(n_answers),
            "sum_squares": packs.sums(lengths**2),
            "sum_sqrt": packs.sums(np.sqrt(supervised.astype(np.float64))),
            "sum_sqrt_per_answer": packs.sums(sqrt_per_answer),
        },
        schema=_SCHEMA,
    )


def _per_answer(answer_lengths: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Per row: the number of answers, and the sum of the square roots of their lengths."""
    column = answer_lengths.combine_chunks()
    offsets = np.asarray(column.offsets)
    sums = np.concatenate([[0.0], np.cumsum(np.sqrt(np.asarray(column.values, np.float64)))])
    return np.diff(offsets).astype(np.int64), sums[offsets[1:]] - sums[offsets[:-1]]


def store_identity(store: SampleStore) -> str:
    """What an index was made for: the hash of the rows it numbers."""
    return str(store.manifest.files[f"{store.length}/samples.arrow"]["sha256"])


class Packs(Protocol):
    """Packs by their numbers: a `PackIndex`, or those of a store that is followed."""

    def __len__(self) -> int: ...

    def rows(self, pack: int, /) -> list[int]:
        """Store rows of a pack, in their order within it."""

    def column(self, name: str, packs: np.ndarray, /) -> np.ndarray:
        """Values of one numeric column for some packs."""


@dataclass(frozen=True)
class PackIndex:
    """A pack index read back: the rows of each pack, and the columns of packs.arrow as arrays."""

    table: pa.Table

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, pack: int) -> list[int]:
        """Store rows of a pack, in their order within it."""
        return list(self.table["rows"][pack].as_py())

    def column(self, name: str, packs: np.ndarray) -> np.ndarray:
        """Values of one numeric column for some packs."""
        return np.asarray(self.table[name].take(pa.array(packs)))


def read_packs(store: SampleStore) -> PackIndex:
    """Read the pack index of a store's length.

    Raises:
        UserError: there is none, or if it was made for another length or for other rows.
    """
    again = f"run pack_data --data {store.path} --length {store.length}"
    path = store.folder / "packs.arrow"
    if not path.is_file():
        raise UserError(f"{store.path} has no packs for length {store.length}; {again}")
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        raise UserError(f"{path} cannot be read; {again}") from None
    if missing := [name for name in _SCHEMA.names if name not in table.column_names]:
        raise UserError(f"{path} is of an earlier version, without {missing[0]}; {again}")
    made_for = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if made_for.get("length") != str(store.length) or made_for.get("store") != store_identity(store):
        raise UserError(f"{path} was made for other data; {again}")
    return PackIndex(table)

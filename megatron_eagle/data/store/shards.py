"""The shards of a store that training may follow: rows that are complete, while later ones are being made.

D/<N>/shards/00000012.arrow     the new samples of a shard (`SampleColumns`), and in its metadata:
    head    numbers of the shard, its first row, sample and token; `digest` of it and all shards before it
    takes   int64: the shard's rows, as numbers of samples (of this shard, or of an earlier one that it
            repeats)

A shard appears when its tokens are on the disk, whole and under its name at once; it is never changed. Rows
and samples have the numbers that they have in the finished store.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_eagle.data.store.manifest import DataManifest, read_manifest
from megatron_eagle.data.store.reader import SCHEMA, Rows, SampleStore, StoredSample, find_media, row_readers
from megatron_eagle.data.store.signs import growing_folder
from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, sync, write_whole

SHARDS = "shards"
ROWS = 512  # of a shard, where nothing else is asked for
_TOKENS: dict[str, np.dtype[Any]] = {"tokens": np.dtype(np.int32), "answers": np.dtype(np.uint16)}


@dataclass(frozen=True)
class ShardHead:
    """Where a shard stands in the store. `digest` is the SHA-256 of all rows and tokens up to its end."""

    number: int
    first_row: int
    n_rows: int
    first_sample: int
    n_samples: int
    first_token: int
    n_tokens: int
    previous: str
    digest: str

    @property
    def end(self) -> "ShardHead":
        """An empty one behind it."""
        return ShardHead(
            self.number + 1,
            self.first_row + self.n_rows,
            0,
            self.first_sample + self.n_samples,
            0,
            self.first_token + self.n_tokens,
            0,
            self.digest,
            self.digest,
        )


BEFORE_ALL = ShardHead(-1, 0, 0, 0, 0, 0, 0, "", "")


def shard_path(folder: Path, number: int) -> Path:
    """Of a shard of the length whose folder this is."""
    return folder / SHARDS / f"{number:08d}.arrow"


def read_head(folder: Path, number: int) -> ShardHead | None:
    """A shard's head; None: it is not there (yet).

    Raises:
        UserError: it is damaged.
    """
    found = _open(shard_path(folder, number))
    return None if found is None else _head(found)


def write_shard(folder: Path, before: ShardHead, samples: pa.Table, takes: np.ndarray) -> ShardHead:
    """Publish the shard behind `before`. Its tokens must be on the disk.

    Args:
        samples: the new ones (`SCHEMA`).
        takes: its rows, as numbers of samples, int64.

    Raises:
        OSError: it cannot be written.
    """
    start = before.end
    whole = samples.combine_chunks()
    whole = whole.take(np.arange(len(whole)))  # as if it had never been in several pieces
    n_tokens = int(np.asarray(whole["n_tokens"]).sum(dtype=np.int64))
    batches = whole.to_batches()
    digest = hashlib.sha256(start.previous.encode())
    for batch in batches:
        digest.update(batch.serialize())
    digest.update(takes.tobytes())
    for name, dtype in _TOKENS.items():
        with (folder / f"{name}.bin").open("rb") as file:
            file.seek(start.first_token * dtype.itemsize)
            digest.update(file.read(n_tokens * dtype.itemsize))
    head = ShardHead(
        start.number,
        start.first_row,
        len(takes),
        start.first_sample,
        len(whole),
        start.first_token,
        n_tokens,
        start.previous,
        digest.hexdigest(),
    )
    sink = pa.BufferOutputStream()
    metadata = {"head": json.dumps(asdict(head)), "takes": takes.tobytes()}
    with pa.ipc.new_file(sink, SCHEMA.with_metadata(metadata)) as out:
        out.write_table(whole)
    path = shard_path(folder, head.number)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, sink.getvalue().to_pybytes())
    sync(path.parent)
    return head


def last_head(folder: Path) -> ShardHead:
    """The head of the last shard that is there; `BEFORE_ALL` if there is none."""
    number = -1
    while shard_path(folder, number + 1).exists():
        number += 1
    head = read_head(folder, number) if number >= 0 else None
    return head or BEFORE_ALL


def _open(path: Path) -> Any:
    """The Arrow file of a shard; None: it is not there."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowInvalid):
        raise UserError(f"{path} cannot be read; preprocess the data again") from None


def _head(file: Any) -> ShardHead:
    return from_record(ShardHead, json.loads(file.schema.metadata[b"head"]))


class _Shard:
    """A shard, opened."""

    def __init__(self, file: Any):
        self.head = _head(file)
        self.takes = np.frombuffer(file.schema.metadata[b"takes"], np.int64)
        self.samples: pa.Table = file.read_all()

    @cached_property
    def starts(self) -> np.ndarray:
        """The first token of each sample."""
        lengths = np.asarray(self.samples["n_tokens"]).astype(np.int64)
        return self.head.first_token + np.cumsum(lengths) - lengths

    @cached_property
    def readers(self) -> dict[str, Any]:
        """Of each column."""
        return row_readers(self.samples.to_batches()[0])


def store_folder(path: str | Path) -> Path:
    """Where to read a store that is being made or finished: what is being made comes before what is there."""
    partial = growing_folder(path)
    return partial if (partial / "manifest.json").is_file() else Path(path)


def _locate(path: str | Path) -> tuple[Path, DataManifest]:
    """Where a store is, and its manifest, also where it is moved to its final place between the two."""
    folder = store_folder(path)
    try:
        return folder, read_manifest(folder)
    except UserError:
        if (moved := store_folder(path)) == folder:
            raise
        return moved, read_manifest(moved)


def open_any_rows(path: str | Path, length: int | None = None) -> Rows:
    """The rows of a store; of one that is being made, where none is complete, those that are there.

    Raises:
        UserError: as `SampleStore`.
    """
    complete = (Path(path) / "manifest.json").is_file() or store_folder(path) == Path(path)
    return SampleStore(path, length) if complete else ShardStore(path, length)


class ShardStore:
    """The rows of one length of a store that may still grow; as `SampleStore`, by the same row numbers.

    Raises:
        UserError: there is no store, or none that can be followed; a length that it is not made for.
    """

    def __init__(self, path: str | Path, length: int | None = None):
        self.place = Path(path)
        self.path, self.manifest = _locate(path)
        if not self.manifest.shard_rows:
            raise UserError(
                f"data.follow: {path} was made without preprocess run --follow; leave data.follow out, or "
                "make the data again"
            )
        lengths = self.manifest.lengths
        self.length = max(lengths) if length is None else length
        if self.length not in lengths:
            raise UserError(
                f"{path} has no plan for length {self.length}; it has {', '.join(map(str, lengths))}"
            )
        self._dataset_of_source = self.manifest.dataset_of_source
        self._there = 0
        self._shard = lru_cache(maxsize=128)(self._open_shard)
        self._files: dict[str, np.ndarray] = {}

    @property
    def folder(self) -> Path:
        """Of the length: where it is now."""
        return self.path / str(self.length)

    @property
    def n_shards(self) -> int:
        """When it is complete."""
        return -(-self.manifest.n_takes // self.manifest.shard_rows)

    @property
    def shards_there(self) -> int:
        """Those that can be read now."""
        if not shard_path(self.folder, self._there).parent.is_dir():
            self._move()
        while self._there < self.n_shards and shard_path(self.folder, self._there).exists():
            self._there += 1
        return self._there

    def heads(self, first: int, last: int) -> list[ShardHead] | None:
        """The heads of shards first .. last - 1, which can be read from now on; None: not all are there yet.

        Raises:
            UserError: they do not belong together.
        """
        if first >= last:
            return []
        found = self._heads(first, last)  # which may be moved to its final place meanwhile
        return self._heads(first, last) if found is None and self._move() else found

    def _heads(self, first: int, last: int) -> list[ShardHead] | None:
        end = read_head(self.folder, last - 1)
        if end is None or not self._has_tokens(end.first_token + end.n_tokens):
            return None
        heads = [read_head(self.folder, number) for number in range(first, last)]
        found = [head for head in heads if head is not None]
        if len(found) < len(heads):
            return None
        for one, other in zip(found, found[1:], strict=False):
            if other.previous != one.digest:
                raise UserError(self.changed(f"shard {other.number} does not follow from {one.number}"))
        try:
            self._read_same(self.path)  # after the shards: whoever begins anew writes it before any of them
        except UserError:
            if (self.path / "manifest.json").is_file():
                raise
            return None  # it was moved, or is being begun anew
        self._there = max(self._there, last)
        return found

    def changed(self, what: str) -> str:
        """A line for a store that is not the one that was read before."""
        return f"{self.place}: begun anew or changed while it was read: {what}"

    def __len__(self) -> int:
        there = self.shards_there
        head = read_head(self.folder, there - 1) if there else None
        return head.first_row + head.n_rows if head else 0

    def __getitem__(self, row: int) -> StoredSample:
        shard = self._find(row, "first_row")
        place = row - shard.head.first_row
        if not 0 <= place < len(shard.takes):
            raise IndexError(f"row {row} of a store that has none, or not yet")
        number = int(shard.takes[place])
        if number < shard.head.first_sample:
            shard = self._find(number, "first_sample")
        i = number - shard.head.first_sample
        values = {name: read(i) for name, read in shard.readers.items()}
        if not self.path.is_dir():
            self._move()
        find_media(values, self.path)
        start = int(shard.starts[i])
        ids, answers = (
            self._tokens(name, start + values["n_tokens"])[start : start + values["n_tokens"]]
            for name in _TOKENS
        )
        return StoredSample(
            **values,
            file=self.manifest.sources[values["source"]],
            dataset=self._dataset_of_source[values["source"]],
            ids=ids,
            answers=answers,
        )

    def columns(self, names: Sequence[str], first: int, last: int) -> pa.Table:
        """Some columns of the rows of shards first .. last - 1."""
        shards = [self._shard(number) for number in range(first, last)]
        numbers = np.concatenate([np.zeros(0, np.int64), *(shard.takes for shard in shards)])
        order = np.argsort(numbers, kind="stable")
        parts, done = [SCHEMA.empty_table().select(names)], 0
        while done < len(order):
            shard = self._find(int(numbers[order[done]]), "first_sample")
            end = np.searchsorted(numbers, shard.head.end.first_sample, sorter=order)
            own = numbers[order[done:end]] - shard.head.first_sample
            parts.append(shard.samples.select(names).take(own))
            done = int(end)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_tables(parts).combine_chunks().take(back)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows that are there."""
        return self.columns([name], 0, self.shards_there)[name]

    def _move(self) -> bool:
        """Look for the store at its final place; whether it is elsewhere now."""
        folder = store_folder(self.place)
        if folder == self.path or not (folder / "manifest.json").is_file():
            return False
        self.path, self.manifest = folder, self._read_same(folder)
        return True

    def _read_same(self, folder: Path) -> DataManifest:
        """The manifest as it is now; its input decides how many rows and sources there will be."""
        manifest = read_manifest(folder)
        if manifest.input_key != self.manifest.input_key:
            raise UserError(self.changed(f"{folder} is made from other input or settings"))
        return manifest

    def _find(self, value: int, key: str) -> _Shard:
        """The last shard whose `key` is at most a value, among those that were read; empty ones aside."""
        low = bisect_right(
            range(self._there), value, key=lambda number: getattr(self._shard(number).head, key)
        )
        return self._shard(max(0, low - 1))

    def _open_shard(self, number: int) -> _Shard:
        file = _open(shard_path(self.folder, number))
        if file is None and self._move():
            file = _open(shard_path(self.folder, number))
        if file is None:
            raise UserError(self.changed(f"shard {number} is gone"))
        return _Shard(file)

    def _has_tokens(self, end: int) -> bool:
        try:
            return all(len(self._tokens(name, end)) >= end for name in _TOKENS)
        except OSError:
            return False

    def _tokens(self, name: str, end: int) -> np.ndarray:
        """The elements of a token file, mapped anew when more are asked for."""
        found = self._files.get(name)
        if found is None or len(found) < end:
            dtype = _TOKENS[name]
            path = self.folder / f"{name}.bin"
            n = path.stat().st_size // dtype.itemsize
            found = np.memmap(path, dtype, "r", shape=(n,)).view(np.ndarray) if n else np.zeros(0, dtype)
            self._files[name] = found
        return found

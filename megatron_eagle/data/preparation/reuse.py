"""Whether work that was done can be used again: the key of everything a store follows from, and its media."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from megatron_eagle.data.annotations.formats import TEXT_PROBLEMS
from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.annotations.records import description
from megatron_eagle.data.media.remote.files import ONLY_LOCAL, MediaAccess
from megatron_eagle.data.media.source import FileMetadata, file_metadata, fingerprint
from megatron_eagle.data.preparation.line_numbers import line_keys
from megatron_eagle.data.preparation.processor import Outcome, PreprocessSettings, StoreRow
from megatron_eagle.data.store.manifest import FORMAT_VERSION, read_manifest
from megatron_eagle.data.store.media_names import FOLDER, is_own
from megatron_eagle.data.store.reader import SampleColumns, SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, read_records
from megatron_eagle.problems import LedgerEntry, Problem

READING = 3
"""Goes up when records or media come to mean something else, so that stores made before are made again."""

_ASKING, _ASKED = 16, 1024  # threads, and media that they are given at a time: stores answer slowly


def cache_key(datasets: list[Dataset], settings: PreprocessSettings, tokenizer_fingerprint: str) -> str:
    """SHA-256 over the input and all settings: annotation files (`_content`) and how they are read,
    tokenizer, template, lengths, sampling and tiling.
    """
    sources = []
    for dataset in datasets:
        content = _content(dataset.annotation)
        overrides = dict(sorted(dataset.overrides.items()))
        taken = [dataset.repeat_time, dataset.strategy]
        how = [dataset.root, *taken, overrides, asdict(dataset.conventions)]
        sources.append([dataset.name, str(dataset.annotation), content, *how])
    decisive = asdict(settings)
    del decisive["remote"]  # how media are had changes none of them
    everything = {
        **decisive,
        "tokenizer": tokenizer_fingerprint,
        "sources": sources,
        "reading": READING,
    }
    return hashlib.sha256(json.dumps([FORMAT_VERSION, everything], sort_keys=True).encode()).hexdigest()


def _content(annotation: Path) -> str:
    """What an annotation file holds.  Of one that holds its media too, and may have terabytes, its size, time
    of change, beginning, middle and end.
    """
    if (beside := description(annotation)) is not None:
        file = file_metadata(str(annotation))
        return f"{file.size} {file.mtime_ns} {fingerprint(file.path)}{beside}"
    with annotation.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_current(folder: Path, key: str, files: MediaAccess = ONLY_LOCAL) -> bool:
    """Whether `folder` is a store that follows from the same input as one of this key.

    That is so if it has this key and its media have the size and time of change that they had. What was
    dropped for its media may be in order by now: `FinishedLines` says which lines those are.

    Raises:
        UserError: `files` may not ask for a remote medium of the store.
    """
    try:
        store = SampleStore(folder)
    except (UserError, OSError):
        return False
    if store.manifest.input_key != key or not (folder / "dropped.jsonl").is_file():
        return False
    own = {
        name: file["bytes"] for name, file in store.manifest.files.items() if name.startswith(FOLDER + "/")
    }
    if not all(_has_size(folder / name, size) for name, size in own.items()):
        return False
    with ThreadPoolExecutor(_ASKING) as pool:
        known = _media(store)
        while block := list(islice(known, _ASKED)):
            if not all(pool.map(partial(_is_unchanged, files), block)):
                return False
    return True


def _media(store: SampleStore) -> Iterator[FileMetadata]:
    """All media of a store as they were, each once, but those that it has itself."""
    seen: set[str] = set()
    for name in ("images", "videos"):
        for chunk in store.column(name).chunks:
            media = chunk.flatten()
            columns = (pc.struct_field(media, part) for part in ("path", "file_size", "mtime_ns"))
            for path, size, mtime in zip(*(column.to_pylist() for column in columns), strict=True):
                if path not in seen and not is_own(path):
                    yield FileMetadata(path, size, mtime)
                seen.add(path)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_unchanged(files: MediaAccess, before: FileMetadata) -> bool:
    files.check_allowed(before.path)
    try:
        return files.metadata(before.path) == before
    except Problem:
        return False


class FinishedLines:
    """What became of the lines of a finished store, but of those that were dropped for their media.

    Lines are named by the number of their source and their own, from 0.
    """

    def __init__(self, folder: Path):
        manifest = read_manifest(folder)
        entries = [from_record(LedgerEntry, record) for record in read_records(folder / "dropped.jsonl")]
        numbers: dict[str, list[int]] = {}
        for number, file in enumerate(manifest.sources):
            numbers.setdefault(file, []).append(number)
        self._dropped: dict[tuple[int, int], list[LedgerEntry]] = {}
        for entry in entries:
            for source in numbers[entry.file]:
                self._dropped.setdefault((source, entry.line - 1), []).append(entry)
        # A file that is read twice: the ledger does not say which time a line failed.
        self.failed: set[tuple[int, int]] = {
            line
            for line, own in self._dropped.items()
            if not {entry.kind for entry in own} <= TEXT_PROBLEMS or len(numbers[own[0].file]) > 1
        }
        """The lines to be tried again."""
        self._stores = {length: SampleStore(folder, length) for length in manifest.lengths}
        self._rows = {length: _FirstRows(store) for length, store in self._stores.items()}

    def outcome(self, line: tuple[int, int]) -> Outcome:
        """What became of a line that is not among the failed ones."""
        rows = {}
        for length, store in self._stores.items():
            if (row := self._rows[length].find(*line)) is not None:
                sample = store[row]
                columns = SampleColumns(**{f.name: getattr(sample, f.name) for f in fields(SampleColumns)})
                rows[length] = StoreRow(sample.ids, sample.answers, columns)
        return Outcome(rows, tuple(self._dropped.get(line, ())))


class _FirstRows:
    """The row of each line, of one that is repeated the first: 16 bytes a line."""

    def __init__(self, store: SampleStore):
        sources, lines = (np.asarray(store.column(name)) for name in ("source", "line"))
        self._lines, self._rows = np.unique(line_keys(sources, lines.astype(np.int64)), return_index=True)

    def find(self, source: int, line: int) -> int | None:
        """The row of a line (from 0), or None."""
        key = line_keys(np.array(source), np.array(line + 1))
        place = int(np.searchsorted(self._lines, key))
        found = place < len(self._lines) and self._lines[place] == key
        return int(self._rows[place]) if found else None

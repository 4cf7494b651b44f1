"""Whether work that was done can be used again: the key of everything a store follows from, and its media."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.compute as pc

from megatron_eagle.data.annotations.formats import TEXT_PROBLEMS
from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.media.source import FileMetadata, file_metadata
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.store.reader import FORMAT_VERSION, SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

READING = 3
"""Goes up when records or media come to mean something else, so that stores made before are made again."""


def cache_key(datasets: list[Dataset], settings: PreprocessSettings, tokenizer_fingerprint: str) -> str:
    """SHA-256 over the input and all settings: annotation files by content and how they are read, tokenizer,
    template, lengths, sampling and tiling.
    """
    sources = []
    for dataset in datasets:
        with dataset.annotation.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        overrides = dict(sorted(dataset.overrides.items()))
        taken = [dataset.repeat_time, dataset.strategy]
        how = [dataset.root, *taken, overrides, asdict(dataset.conventions)]
        sources.append([dataset.name, str(dataset.annotation), content, *how])
    everything = {
        **asdict(settings),
        "tokenizer": tokenizer_fingerprint,
        "sources": sources,
        "reading": READING,
    }
    return hashlib.sha256(json.dumps([FORMAT_VERSION, everything], sort_keys=True).encode()).hexdigest()


def is_current(folder: Path, key: str) -> bool:
    """Whether `folder` is a store that would come out the same if it were made again.

    That is so if it has this key, its media have the size and time of change that they had, and no sample was
    dropped for its media, which might be in order by now.
    """
    try:
        store = SampleStore(folder)
        with (folder / "dropped.jsonl").open(encoding="utf-8") as ledger:
            kinds = {json.loads(line)["kind"] for line in ledger}
    except (UserError, OSError):
        return False
    if store.manifest.input_key != key or not kinds <= TEXT_PROBLEMS:
        return False
    seen: set[str] = set()
    for name in ("images", "videos"):
        for chunk in store.column(name).chunks:
            media = chunk.flatten()
            columns = (pc.struct_field(media, part) for part in ("path", "file_size", "mtime_ns"))
            for path, size, mtime in zip(*(column.to_pylist() for column in columns), strict=True):
                if path not in seen and not _is_unchanged(path, size, mtime):
                    return False
                seen.add(path)
    return True


def _is_unchanged(path: str, size: int, mtime_ns: int) -> bool:
    try:
        return file_metadata(path) == FileMetadata(path, size, mtime_ns)
    except Problem:
        return False

"""The archives of a recipe: their indexes are made before anything is read of them, in several processes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.data.annotations.roots import prepared_root
from megatron_eagle.data.media.archive_index import index_file
from megatron_eagle.data.media.archive_scan import archive_kind
from megatron_eagle.data.preparation.engines import in_processes

_FEW = 8  # archives whose indexes take less time than processes to start


def with_archives(datasets: Sequence[Dataset], cache: Path, workers: int | None) -> list[Dataset]:
    """The data sets with roots as `open_root` takes them; `cache` holds all their archives' indexes then.

    Raises:
        UserError: an archive is damaged or cut off, or `cache` cannot be written.
    """
    shards = [dataset.annotation for dataset in datasets if archive_kind(dataset.annotation) == "tar"]
    new = [path for path in dict.fromkeys(shards) if not index_file(path, cache).exists()]
    workers = min(workers or os.cpu_count() or 1, len(new))
    if workers > 1 and len(new) > _FEW:
        made = in_processes(partial(_index, cache), new, workers)
        for _ in tqdm(made, total=len(new), desc="index", unit=" archives", dynamic_ncols=True):
            pass
    return [replace(dataset, root=prepared_root(dataset.root, cache)) for dataset in datasets]


def _index(cache: Path, path: Path) -> list[int]:
    return [len(open_records(path, cache))]


def remove_unpacked(cache: Path) -> None:
    """Let go of what was unpacked of packed archives: the media that are used have been taken over."""
    for path in cache.glob("*.tar"):
        index_file(path, cache).unlink(missing_ok=True)
        path.unlink()

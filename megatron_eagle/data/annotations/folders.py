"""The annotation files of a folder: as they lie in it, or as Hugging Face's tools leave a data set."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_eagle.data.annotations.energon import energon_folder
from megatron_eagle.data.annotations.records import (
    ANNOTATION_SUFFIXES,
    SHARD_SUFFIX,
    TABLE_SUFFIXES,
    is_annotation,
)
from megatron_eagle.errors import UserError

_SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")
_OF_AN_ARCHIVE = ("_stats.json", ".parquet")  # as img2dataset leaves them: counts, and the texts once more
_SHARD = re.compile(r"(?:.*-)?(?P<split>[\w.]+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?\.\w+")


def annotation_files(folder: Path, split: str | None = None) -> list[Path]:
    """The files of a folder, in order: of a data set saved by `datasets` or prepared by Energon, of a folder
    of annotations, or of one that holds tables, else tar archives, somewhere below it, as `huggingface-cli
    download` leaves it.

    Args:
        split: the one that is taken, where the folder has several.

    Raises:
        UserError: there are none, those of several splits and none is named, or not all of a split.
    """
    saved = _saved(folder, split)
    if saved is not None:
        return saved
    if (energon := energon_folder(folder)) is not None:
        return energon.archives(split)
    there = list(folder.iterdir())
    found = _annotations(there)
    if len({_is_table(path) for path in found}) > 1:
        raise UserError(
            f"{folder} holds JSON files and tables; say which are meant, e.g. {folder.name}/*.json"
        )
    if not found:
        there = _below(folder)
        found = sorted(filter(_is_table, _annotations(there))) or sorted(filter(_is_shard, there))
    if not found:
        kinds = ", ".join((*ANNOTATION_SUFFIXES, *TABLE_SUFFIXES, SHARD_SUFFIX))
        raise UserError(f"the folder {folder} holds no {kinds}")
    _check_told_apart(found, there, folder)
    found = _of_split(found, folder, split)
    _check_complete(found)
    return found


def _annotations(paths: Iterable[Path]) -> list[Path]:
    """Those that hold records, in order, and are not what img2dataset tells of an archive beside them."""
    there = list(paths)
    archives = {path.with_suffix("") for path in there if _is_shard(path)}
    told = {f"{archive}{suffix}" for archive in archives for suffix in _OF_AN_ARCHIVE}
    return sorted(path for path in there if is_annotation(path) and str(path) not in told)


def _check_told_apart(found: list[Path], there: list[Path], folder: Path) -> None:
    """Let pass a folder whose tables or archives are its records.

    Raises:
        UserError: it holds tables, and archives that are not those of a table each.
    """
    tables = [path for path in found if _is_table(path)]
    shards = [path for path in there if _is_shard(path)]
    if tables and shards:
        one, other = (path.relative_to(folder) for path in (tables[0], min(shards)))
        raise UserError(
            f"{folder} holds tables ({one}) and tar archives ({other}), and either may be the records; name "
            f"those that are: {_pattern(folder, one)} or {_pattern(folder, other)}"
        )


def _pattern(folder: Path, file: Path) -> str:
    return str(Path(folder.name, file.parent, f"*{file.suffix}"))


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_SUFFIXES


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == SHARD_SUFFIX


def _below(folder: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        found += [path for path in paths if is_annotation(path) or _is_shard(path)]
    return found


def _of_split(files: list[Path], folder: Path, split: str | None) -> list[Path]:
    """The files of one split.

    Raises:
        UserError: several splits lie there as tables or archives and none is named, or the named one does
            not.
    """
    names = {file: _split_of(file, folder) for file in files}
    tables = {name for file, name in names.items() if name and (_is_table(file) or _is_shard(file))}
    if split is None:
        if len(tables) > 1:
            raise UserError(
                f"{folder} holds the splits {', '.join(sorted(tables))}; say which is meant, e.g. split: "
                f"{'train' if 'train' in tables else min(tables)}"
            )
        return files
    chosen = [file for file, name in names.items() if name == split]
    if not chosen:
        there = sorted({name for name in names.values() if name})
        raise UserError(f"{folder} has no split {split}; it has {', '.join(there) or 'none that is named'}")
    return chosen


def _check_complete(files: list[Path]) -> None:
    """Let pass folders that have all the files of which each says how many there are.

    Raises:
        UserError: some are missing.
    """
    matches = [(file, match) for file in files if (match := _SHARD.fullmatch(file.name))]
    sets: dict[tuple[Path, str, str], set[int]] = {}
    for file, match in matches:
        sets.setdefault((file.parent, match["split"], match["count"]), set()).add(int(match["number"]))
    for (folder, split, count), numbers in sets.items():
        if missing := sorted(set(range(int(count))) - numbers):
            raise UserError(
                f"{folder} has {len(numbers)} of {int(count)} files of {split}, number {missing[0]:05d} is "
                "missing; fetch it, or name those that are there with a pattern"
            )


def _split_of(file: Path, folder: Path) -> str:
    """The split that a file is of, by its name or its folder's; nothing if neither says so."""
    stem = file.name.split(".")[0]
    if match := _SHARD.fullmatch(file.name):
        return match["split"]
    inside = file.relative_to(folder).parent.parts
    return next((name for name in (stem, *reversed(inside)) if name in _SPLIT_NAMES), "")


def _saved(folder: Path, split: str | None) -> list[Path] | None:
    """The Arrow files of a data set that `save_to_disk` wrote, of one of its splits; None if it is none.

    Raises:
        UserError: its description is broken, or names no split that is asked for.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _names(_object(folder / "dataset_dict.json").get("splits"))
        if not splits:
            raise UserError(f"{folder}/dataset_dict.json names no splits")
        if split is None and len(splits) > 1:
            raise UserError(
                f"{folder} holds the splits {', '.join(splits)}; say which is meant, e.g. split: {splits[0]}"
            )
        name = splits[0] if split is None else split
        if name not in splits:
            raise UserError(f"{folder} has no split {name}; it has {', '.join(splits)}")
        return _saved(folder / name, None) or annotation_files(folder / name)
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    state = _object(folder / "state.json")
    if split is not None and state.get("_split") != split:
        raise UserError(f"{folder} is the split {state.get('_split')}, not {split}")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} is a choice of rows of other files; call flatten_indices() before save_to_disk()"
        )
    items = state.get("_data_files") or []
    names = _names([item.get("filename") if isinstance(item, dict) else None for item in items])
    if not names:
        raise UserError(f"{folder}/state.json names no data files")
    files = [folder / name for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} is missing, which {folder}/state.json names")
    return files


def _names(items: object) -> list[str]:
    """Names of what lies in the folder itself; nothing if one of them is none."""
    names = [name for name in items if isinstance(name, str)] if isinstance(items, list) else []
    plain = all(name not in ("", ".", "..") and os.path.basename(name) == name for name in names)
    return names if isinstance(items, list) and plain and len(names) == len(items) else []


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content

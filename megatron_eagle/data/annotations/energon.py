"""What Energon's `.nv-meta` says of a folder of tar archives: splits, what is left out, fields, places.

Its files are data here; the programs that may lie among them (`sample_loader.py`, `part_filter.py`) are never
run.
"""

import json
import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from megatron_eagle.data.media.archive_scan import Member, plain_name, tar_header_name
from megatron_eagle.errors import UserError

META = ".nv-meta"
_LEVELS = 8  # of folders above an archive in which `.nv-meta` is looked for
# Fields of Energon's sample types that a record has a place for; with others its own parts say what it is.
_FIELDS = {
    "image": "images",
    "video": "videos",
    "caption": "caption",
    "context": "question",
    "answers": "answer",
    "answer": "answer",
}
_PART = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
_LOOKED_AT = 16  # members of an archive whose names are compared with its index


@dataclass(frozen=True)
class PartField:
    """A key of a record, and the parts that it may come from: the first that is there, and steps into it."""

    key: str
    parts: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class EnergonFolder:
    """A folder that Energon has prepared.

    Attributes:
        splits: the archives of each split, relative to the folder.
        excluded: archives, and records as `ARCHIVE/KEY`, that are left out.
        fields: what parts are to become; empty if the parts themselves say so.
        code: whether a program describes the records.
    """

    folder: Path
    splits: Mapping[str, Sequence[str]]
    excluded: frozenset[str]
    fields: tuple[PartField, ...] = ()
    code: bool = False
    shards: tuple[str, ...] = field(default=(), compare=False)

    def archives(self, split: str | None) -> list[Path]:
        """The archives of a split.

        Raises:
            UserError: there is no such split, several and none is named, an archive is missing, or none is
                left of it.
        """
        there = [name for name, files in self.splits.items() if files]
        if split is None and len(there) > 1:
            raise UserError(
                f"{self.folder} holds the splits {', '.join(there)}; say which is meant, "
                f"e.g. split: {there[0]}"
            )
        chosen = split or next(iter(there), "")
        if chosen not in self.splits:
            raise UserError(f"{self.folder} has no split {chosen}; it has {', '.join(there) or 'none'}")
        files = [self.folder / name for name in self.splits[chosen] if name not in self.excluded]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]} is missing, which {self.folder / META}/split.yaml names")
        if not files:
            raise UserError(f"the split {chosen} of {self.folder} has no archive that is not excluded")
        return files

    def takes(self, archive: Path, key: str) -> bool:
        """Whether a record of an archive is not left out."""
        return f"{self._name(archive)}/{key}" not in self.excluded

    def members(self, archive: Path) -> list[Member] | None:
        """The members of an archive by `index.sqlite`; None if there is none that fits."""
        file = self.folder / META / "index.sqlite"
        name = self._name(archive)
        if name not in self.shards or not file.is_file():
            return None
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro&immutable=1", uri=True)) as index:
                rows = index.execute(_QUERY, (self.shards.index(name),)).fetchall()
        except sqlite3.Error:
            return None
        found: dict[str, Member] = {}
        for key, part, offset, size in rows:
            if not (isinstance(offset, int) and isinstance(size, int) and offset >= 512 and size >= 0):
                return None
            if full := plain_name(f"{key}.{part}"):
                found.pop(full, None)
                found[full] = Member(full, offset, size)
        members = list(found.values())
        return members if members and _fits(archive, members) else None

    def _name(self, archive: Path) -> str:
        return os.path.relpath(os.path.abspath(archive), self.folder)


_QUERY = (
    "SELECT s.sample_key, p.part_name, p.content_byte_offset, p.content_byte_size FROM sample_parts AS p "
    "JOIN samples AS s ON s.tar_file_id = p.tar_file_id AND s.sample_index = p.sample_index "
    "WHERE p.tar_file_id = ? ORDER BY p.content_byte_offset"
)


def _fits(archive: Path, members: Sequence[Member]) -> bool:
    """Whether members leave room for headers, the archive ends behind the last, and some have their names."""
    ends = [0, *(one.place + -(-one.size // 512) * 512 for one in members)]
    if any(one.place % 512 or one.place < end + 512 for one, end in zip(members, ends, strict=False)):
        return False
    try:
        with archive.open("rb") as file:
            last = members[-1]
            file.seek(ends[-1])
            if any(file.read(1024) or b"\1"):
                return False
            step = max(1, len(members) // _LOOKED_AT)
            return all(tar_header_name(file, one.place) == one.name for one in (*members[::step], last))
    except OSError:
        return False


def energon_folder(folder: Path) -> EnergonFolder | None:
    """What `.nv-meta` of a folder says; None if there is none.

    Raises:
        UserError: it is broken, or names archives elsewhere.
    """
    meta = folder / META
    if not meta.is_dir():
        return None
    dates = (_mtime(meta / name) for name in ("split.yaml", "dataset.yaml", ".info.json", ".info.yaml"))
    return _read(Path(os.path.abspath(folder)), tuple(dates))


def energon_folder_of(archive: Path) -> EnergonFolder | None:
    """That of the folder, of those above an archive, that has one and names it."""
    for folder in Path(os.path.abspath(archive)).parents[:_LEVELS]:
        if (folder / META).is_dir():
            found = energon_folder(folder)
            name = os.path.relpath(os.path.abspath(archive), folder)
            known = found and any(name in files for files in found.splits.values())
            return found if known else None
    return None


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=64)
def _read(folder: Path, dates: tuple[int, ...]) -> EnergonFolder:  # noqa: ARG001
    split = _mapping(folder / META / "split.yaml")
    parts = split.get("split_parts") or {}
    if not isinstance(parts, dict):
        raise UserError(f"{folder / META}/split.yaml has no split_parts")
    splits = {str(name): _names(folder, files) for name, files in parts.items()}
    dataset = _mapping(folder / META / "dataset.yaml")
    fields = dataset.get("field_map")
    counts: Any = {}
    for name in (".info.json", ".info.yaml"):
        if (folder / META / name).is_file():
            counts = _mapping(folder / META / name).get("shard_counts") or {}
            break
    return EnergonFolder(
        folder,
        splits,
        frozenset(_names(folder, split.get("exclude") or [])),
        _fields(fields if isinstance(fields, dict) else {}),
        bool(dataset.get("sample_loader")),
        tuple(map(str, counts)) if isinstance(counts, dict) else (),
    )


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file; nothing if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no mapping")
    return content


def _names(folder: Path, names: object) -> list[str]:
    """Names of archives in the folder, braces expanded.

    Raises:
        UserError: one of them is elsewhere.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / META}/split.yaml holds a list of something else than names")
    found = [name for one in names for name in expanded(one)]
    if outside := [name for name in found if plain_name(name) != os.path.normpath(name)]:
        raise UserError(f"{folder / META}/split.yaml names {outside[0]}, which is not in {folder}")
    return [os.path.normpath(name) for name in found]


def _fields(field_map: Mapping[str, Any]) -> tuple[PartField, ...]:
    fields = []
    for name, said in field_map.items():
        parts = re.split(r"[,;]", said) if isinstance(said, str) else []
        matches = [_PART.fullmatch(part.strip()) for part in parts]
        if name not in _FIELDS or not matches or None in matches:
            return ()
        steps = tuple((m[1], tuple(re.findall(r"\[([^\[\]]+)\]", m[2]))) for m in matches if m)
        fields.append(PartField(_FIELDS[name], steps))
    return tuple(fields)


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # names that one pattern stands for


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: `a{00..12}`, `{b,c}`.

    Raises:
        UserError: they are too many, or none.
    """
    names = [""]
    for number, piece in enumerate(_BRACES.split(pattern)):
        choices = _choices(piece) if number % 2 else [piece]
        if len(names) * len(choices) > _MOST:
            raise UserError(f"{pattern} stands for more than {_MOST:,} names")
        names = [name + choice for name in names for choice in choices]
    return names


def _choices(inside: str) -> list[str]:
    match = _RANGE.fullmatch(inside)
    if not match:
        return [choice.strip() for choice in inside.split(",")] if "," in inside else [f"{{{inside}}}"]
    width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise UserError(f"{{{inside}}} stands for no name: it counts down")
    if last - first >= _MOST:
        raise UserError(f"{{{inside}}} stands for more than {_MOST:,} names")
    return [f"{number:0{width}d}" for number in range(first, last + 1)]

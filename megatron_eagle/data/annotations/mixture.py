"""The recipe: which annotation files are read, where their media lie, how often each is repeated."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from megatron_eagle.data.annotations.formats import OVERRIDES, read_overrides
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

_KEYS = ("annotation", "root", "repeat_time", "max_dynamic_tiles", "data_augment", "length", *OVERRIDES)


@dataclass(frozen=True)
class Dataset:
    """One entry of a recipe.

    `ignored` names keys of the recipe that are set and have no effect.  `repeat_time` below 1 takes a fixed
    subset of the lines, above 1 repeats them; its fraction is a fixed subset too.  `overrides` are sampling
    settings for all its samples.
    """

    name: str
    annotation: Path
    root: str
    repeat_time: float = 1.0
    overrides: Mapping[str, float] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def copies(self, n_lines: int) -> np.ndarray:
        """How often each line is taken, int64 [n_lines]: a pure function of the name and `n_lines`."""
        whole = int(self.repeat_time)
        extra = round((self.repeat_time - whole) * n_lines)
        order = np.random.default_rng(zlib.crc32(self.name.encode())).permutation(n_lines)
        copies = np.full(n_lines, whole, np.int64)
        copies[order[:extra]] += 1
        return copies


def read_recipe(path: str | Path) -> list[Dataset]:
    """Read a recipe (JSON or YAML): name -> {annotation, root, repeat_time, ...}.

    Relative paths are looked for beside the recipe, then in the working directory; `root` defaults to the
    annotation file's folder.  Raises `UserError`, also if a file that the recipe names does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"the recipe {path} is neither JSON nor YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"the recipe {path} names no file; it maps names to {{annotation: FILE.jsonl, root: DIR}}"
        )
    return [_read_entry(path, str(name), entry) for name, entry in entries.items()]


def datasets_of(path: str | Path) -> list[Dataset]:
    """The data sets of a recipe; a JSONL file is one with its media beside it.  Raises `UserError`."""
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file():
        return [Dataset(path.name, path, str(path.resolve().parent))]
    return read_recipe(path)


def _read_entry(recipe: Path, name: str, entry: object) -> Dataset:
    where = f'recipe {recipe}, entry "{name}"'
    if not isinstance(entry, dict) or not isinstance(entry.get("annotation"), str):
        raise UserError(f"{where}: needs annotation: FILE.jsonl")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise UserError(f'{where}: unknown key "{unknown[0]}"; known are {", ".join(_KEYS)}')
    annotation = _find(recipe, entry["annotation"])
    if not annotation.is_file():
        raise UserError(f"{where}: the annotation file {entry['annotation']} does not exist")
    try:
        with annotation.open("rb") as file:
            is_list = file.read(64).lstrip()[:1] == b"["
    except OSError as error:
        raise UserError(f"{where}: cannot read {annotation}: {error.strerror}") from None
    if is_list:
        raise UserError(f"{where}: {annotation} is one JSON list; write one record a line (JSONL)")
    root = annotation.parent if entry.get("root") in (None, "") else _find(recipe, str(entry["root"]))
    repeat_time = entry.get("repeat_time", 1)
    if (
        isinstance(repeat_time, bool)
        or not isinstance(repeat_time, int | float)
        or not 0 <= repeat_time < 1e6
    ):
        raise UserError(f"{where}: repeat_time must be a number, not {repeat_time!r}")
    if entry.get("data_augment"):
        raise UserError(
            f"{where}: data_augment is not supported, media are used as they are; set it to false"
        )
    try:
        overrides = read_overrides(entry)
    except Problem as problem:
        raise UserError(f"{where}: {problem.detail}") from None
    ignored = ("data_augment",) if entry.get("data_augment") else ()
    return Dataset(name, annotation, str(root), float(repeat_time), overrides, ignored)


def _find(recipe: Path, path: str) -> Path:
    beside = recipe.resolve().parent / path
    return beside if beside.exists() or not Path(path).exists() else Path(path).resolve()


def line_bounds(path: Path) -> np.ndarray:
    """Byte offsets of a file's lines, int64 [lines + 1]: line i (0-based) ends where line i + 1 begins."""
    parts = [np.zeros(1, np.int64)]
    offset = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            parts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset + 1)
            offset += len(block)
    bounds = np.concatenate(parts)
    return bounds if bounds[-1] == offset else np.append(bounds, offset)

"""The recipe: which annotation files are read, where their media lie, how often each is repeated."""

import codecs
import glob
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_eagle.data.annotations.energon import expanded
from megatron_eagle.data.annotations.folders import annotation_files
from megatron_eagle.data.annotations.parsing import Conventions
from megatron_eagle.data.annotations.recipes import llama_factory_entries, llava_entries
from megatron_eagle.data.annotations.records import ANNOTATION_SUFFIXES, SHARD_SUFFIX, TABLE_SUFFIXES
from megatron_eagle.data.annotations.references import OVERRIDES, read_overrides
from megatron_eagle.data.annotations.roots import archives_root
from megatron_eagle.data.media.remote.addresses import is_remote, parse_place, without_secrets
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

_KEYS = (
    (
        "annotation",
        "root",
        "repeat_time",
        "sampling_strategy",
        "datasets",
        "split",
        "ignore",
        "columns",
        "tags",
    )
    + ("frames_fps", "max_dynamic_tiles", "max_dynamic_patch", *OVERRIDES, "data_augment", "weight")
    + ("length", "modality", "modility", "task")
)


@dataclass(frozen=True)
class Dataset:
    """One annotation file of a recipe's entry; the files of an entry have its name.

    Attributes:
        repeat_time: below 1 takes a fixed subset of the records, above 1 repeats them; its fraction is a
            fixed subset too.
        overrides: sampling settings for all its samples.
        ignored: keys of the recipe that are set and have no effect.
        strategy: takes a part of the records beforehand, as LLaVA's recipes say it: `all`, or `first`, `end`
            or `random` with a number or a percentage behind a colon.
    """

    name: str
    annotation: Path
    root: str
    repeat_time: float = 1.0
    overrides: Mapping[str, float] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    conventions: Conventions = field(default_factory=Conventions)
    strategy: str = "all"

    def copies(self, n_records: int) -> np.ndarray:
        """How often each record is taken, int64 [n_records]: a pure function of the entry and `n_records`."""
        order = np.random.default_rng(zlib.crc32(self.name.encode())).permutation(n_records)
        which, amount = _strategy(self.strategy)
        n = n_records if amount is None else min(n_records, amount(n_records))
        if which == "first":
            order = order[order < n]
        elif which == "end":
            order = order[order >= n_records - n]
        else:
            order = order[:n]
        whole = int(self.repeat_time)
        extra = round((self.repeat_time - whole) * n)
        copies = np.zeros(n_records, np.int64)
        copies[order] = whole
        copies[order[:extra]] += 1
        return copies


def _strategy(text: str) -> tuple[str, Callable[[int], int] | None]:
    """What a strategy takes: from where, and how many of n.

    Raises:
        ValueError: it is none of the known ones.
    """
    which, _, amount = text.partition(":")
    if which == "all" and not amount:
        return which, None
    if which not in ("first", "end", "random") or not amount.removesuffix("%").isdecimal():
        raise ValueError(text)
    number = int(amount.removesuffix("%"))
    return which, (lambda n: math.ceil(number * n / 100)) if amount.endswith("%") else (lambda _: number)


def read_recipe(path: str | Path) -> list[Dataset]:
    """Read a recipe (JSON or YAML): name -> {annotation, root, repeat_time, ...}, or one of another project.

    Relative paths are looked for beside the recipe, then in the working directory; `root` defaults to the
    annotation file's folder.

    Raises:
        UserError: it is no recipe, or a file that it names does not exist.
    """
    path = Path(path)
    entries = _entries(path, _load(path), f"recipe {path}")
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"the recipe {path} names no file; it maps names to {{annotation: FILE.jsonl, root: DIR}}"
        )
    return [dataset for name, entry in entries.items() for dataset in _read_entry(path, str(name), entry)]


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"the recipe {path} is neither JSON nor YAML: {' '.join(str(error).split())}"
        ) from None


def _entries(path: Path, content: Any, where: str, chosen: list[str] | None = None) -> Any:
    """The entries of a recipe's content, whoever wrote it."""
    entries = llava_entries(content, where)
    if entries is None:
        entries = llama_factory_entries(content, path.resolve().parent, where, chosen)
    return content if entries is None else entries


def datasets_of(path: str | Path) -> list[Dataset]:
    """The data sets of a recipe; an annotation file or a folder of them is one with its media beside it.

    Raises:
        UserError: as `read_recipe`.
    """
    path = Path(path)
    if path.is_dir():
        return _read_entry(path, path.name, {"annotation": str(path.resolve())})
    if (
        path.is_file()
        and path.name.endswith((*ANNOTATION_SUFFIXES, *TABLE_SUFFIXES, SHARD_SUFFIX))
        and (path.suffix != ".json" or _is_array(path))
    ):
        return [Dataset(path.name, path, str(path.resolve().parent))]
    return read_recipe(path)


def _is_array(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    except OSError:
        return False


def _read_entry(recipe: Path, name: str, entry: object) -> list[Dataset]:
    """The files of an entry."""
    where = f'recipe {recipe}, entry "{name}"'
    named = entry.get("annotation") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not named or not _is_name(named):
        raise UserError(f"{where}: needs annotation: FILE.jsonl")
    if unknown := [key for key in entry if key not in _KEYS and not str(key).endswith("_description")]:
        raise UserError(f'{where}: unknown key "{unknown[0]}"; known are {", ".join(_KEYS)}')
    if nested := _nested(recipe, where, name, entry):
        return nested
    patterns = [named] if isinstance(named, str) else named
    names = [name for pattern in patterns for name in _expanded(recipe, pattern)]
    split = entry.get("split")
    if split is not None and not isinstance(split, str):
        raise UserError(f"{where}: split must be a name, not {split!r}")
    files = [file for one in names for file in _files(recipe, where, one, split)]
    root = _root(recipe, where, entry, files)
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
    strategy = entry.get("sampling_strategy", "all")
    try:
        overrides = read_overrides(entry)
        _strategy(strategy)
    except Problem as problem:
        raise UserError(f"{where}: {problem.detail}") from None
    except (ValueError, AttributeError):
        raise UserError(
            f"{where}: sampling_strategy must be all, first:N, end:N or random:N (N may be a percentage), "
            f"not {strategy!r}"
        ) from None
    ignored = ("weight",) if entry.get("weight", 1) != 1 else ()
    conventions = _conventions(where, entry)
    return [
        Dataset(name, file, root, float(repeat_time), overrides, ignored, conventions, strategy)
        for file in files
    ]


def _is_name(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _nested(recipe: Path, where: str, name: str, entry: dict[str, Any]) -> list[Dataset]:
    """The data sets of another project's recipe that an entry names; none if it names annotations."""
    named = entry["annotation"]
    is_info = isinstance(named, str) and (Path(named).name == "dataset_info.json" or "datasets" in entry)
    if not isinstance(named, str) or not (is_info or named.endswith((".yaml", ".yml"))):
        return []
    inner = _find(recipe, named)
    chosen = entry.get("datasets")
    if chosen is not None and (not _is_name(chosen) or isinstance(chosen, str)):
        raise UserError(f"{where}: datasets must be a list of names")
    entries = _entries(inner, _load(inner), str(inner), chosen)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{where}: {inner} names no file")
    own = {key: value for key, value in entry.items() if key not in ("annotation", "datasets")}
    if isinstance(root := own.get("root"), list):
        own["root"] = [str(_find(recipe, str(one)).resolve()) for one in root]
    elif root not in (None, "") and not is_remote(str(root)):
        own["root"] = str(_find(recipe, str(root)).resolve())
    found = []
    for key, value in entries.items():
        found += _read_entry(inner, f"{name}/{key}", {**value, **own} if isinstance(value, dict) else value)
    return found


def _expanded(recipe: Path, name: str) -> list[str]:
    """The names that a pattern with braces stands for."""
    return [name] if _find(recipe, name).exists() else expanded(name)


def _files(recipe: Path, where: str, named: str, split: str | None) -> list[Path]:
    """The annotation files that a name stands for: a file, a folder's, or those that a pattern fits."""
    if "://" in named:
        raise UserError(
            f"{where}: {without_secrets(named)} is no file of this machine; download annotations, "
            "media may stay there"
        )
    path = _find(recipe, named)
    if path.is_dir():
        try:
            return annotation_files(path, split)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if split is not None:
        raise UserError(f"{where}: split chooses files of a folder, and {named} is none")
    if path.is_file():
        return [path]
    folders = (recipe.resolve().parent, Path.cwd())
    for folder in folders if glob.has_magic(named) else ():
        if found := sorted(Path(one) for one in glob.glob(str(folder / named), recursive=True)):
            return [one for one in found if one.is_file()]
    raise UserError(f"{where}: the annotation file {named} does not exist")


def _root(recipe: Path, where: str, entry: Mapping[str, Any], files: list[Path]) -> str:
    """What media paths are relative to: a folder, an archive or several.

    Left out: the folder that is named, or the one of the annotations.  Left empty, as EAGLE 2.5's recipes
    have it: what the annotation's own path is relative to.
    """
    root, named = entry.get("root"), entry["annotation"]
    if isinstance(root, list) and root:
        return archives_root(_archives(recipe, where, root))
    if is_remote(str(root)):
        try:
            return str(parse_place(str(root)))
        except ValueError as error:
            raise UserError(f"{where}: root: {error}") from None
    if root not in (None, "", []):
        path = _find(recipe, str(root))
        several = glob.has_magic(str(root)) and not path.exists()
        return archives_root(_archives(recipe, where, [root])) if several else str(path)
    if root == "" and isinstance(named, str) and not Path(named).is_absolute():
        beside = recipe.resolve().parent
        return str(beside if (beside / named).exists() else Path.cwd())
    folders = {file.parent for file in files}
    if isinstance(named, str) and _find(recipe, named).is_dir():
        return str(_find(recipe, named))
    if all(file.suffix == SHARD_SUFFIX for file in files):
        return os.path.commonpath(folders)  # what the records name are their own parts
    if len(folders) > 1:
        raise UserError(f"{where}: files in several folders need a root, what media paths are relative to")
    return str(folders.pop())


def _archives(recipe: Path, where: str, roots: list[Any]) -> list[str]:
    """The archives that names and patterns stand for."""
    found: dict[str, None] = {}
    for root in roots:
        if not isinstance(root, str):
            raise UserError(
                f"{where}: root must be a folder, an archive, or a list of archives, not {roots!r}"
            )
        path = str(_find(recipe, root))
        matches = sorted(glob.glob(path)) if glob.has_magic(root) else [path]
        if not matches:
            raise UserError(f"{where}: no file fits the root {root}")
        found |= dict.fromkeys(matches)
    return list(found)


def _conventions(where: str, entry: Mapping[str, Any]) -> Conventions:
    ignore = entry.get("ignore") or []
    if not _is_name(ignore):
        raise UserError(f"{where}: ignore must be a list of keys, not {ignore!r}")
    names = {}
    for key in ("columns", "tags"):
        names[key] = entry.get(key) or {}
        if not isinstance(names[key], dict) or not all(isinstance(v, str) for v in names[key].values()):
            raise UserError(f"{where}: {key} must map names to names, not {names[key]!r}")
    rate = entry.get("frames_fps")
    if rate is not None and (
        isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e6
    ):
        raise UserError(f"{where}: frames_fps must be a positive number, not {rate!r}")
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    return Conventions(ignore, names["columns"], names["tags"], rate)


def _find(recipe: Path, path: str) -> Path:
    beside = recipe.resolve().parent / path
    return beside if beside.exists() or not Path(path).exists() else Path(path).resolve()

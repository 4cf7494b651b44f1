"""The records of a WebDataset: a tar archive whose members of one base name are the parts of a record.

The base name ends at the first dot, and what follows names the part: `cat.json`, `cat.img_0.jpg`.  A part
`json` is the record itself, which may name the other parts; text beside media is their caption.  Media become
addresses in the archive.  A part that nothing here reads becomes a key of that name, so that it is treated as
any other key that nobody knows.
"""

import codecs
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.data.annotations.dialects import tell
from megatron_eagle.data.annotations.energon import PartField, energon_folder_of
from megatron_eagle.data.annotations.parsing import parse_record
from megatron_eagle.data.annotations.roots import in_order
from megatron_eagle.data.media.archive_index import ArchiveIndex, index_archive
from megatron_eagle.data.media.source import open_bytes
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

PICTURES = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "avif", "jp2", "heic", "heif")
)
_VIDEOS = frozenset(("mp4", "mkv", "webm", "avi", "mov", "m4v", "ts", "mpg", "mpeg", "flv", "wmv", "3gp"))
_SHOWN = PICTURES | _VIDEOS | {"pdf"}
_AUDIO = frozenset(("wav", "mp3", "flac", "ogg", "m4a", "aac", "opus"))
_PICKLES = frozenset(("pyd", "pickle", "pkl", "pth"))  # what webdataset and Energon unpickle
_ROLE = {"role", "from"}  # of `texts` that are messages
_CAPTIONS = ("txt", "text", "caption")
_ORDERS = ("image_keys", "name")  # Energon's names for the order of pictures
_MEDIA = frozenset(
    ("image", "images", "video", "videos", "document", "documents", "image_url", "video_url", "url", "path")
    + ("frames", "data", "image_list", "video_list")
)
_MAX_TEXT = 1 << 26  # bytes of a part that is read as text
_NUMBER = re.compile(r"\d+")

_NONE = np.zeros(0, np.int64)

_Parts = dict[str, int]  # of a record, by name: their numbers in the index


class TarRecords:
    """See `RecordSource`.

    Args:
        cache: where the archive's index is kept (None: nowhere).

    Raises:
        UserError: the archive is damaged or cut off, or holds no record.
    """

    in_workers = False

    def __init__(self, path: Path, cache: Path | None = None):
        self._path, self._cache = path, cache
        self._energon = energon_folder_of(path)
        self._fields = self._energon.fields if self._energon else ()
        self.form = "WebDataset" if self._energon is None else "WebDataset of Energon"
        if self._energon and self._energon.code:
            self.form += ", its sample_loader is not run"
        self._index: ArchiveIndex | None = None
        self._members, self._bounds = _NONE, np.zeros(1, np.int64)
        self._n_records = len(self._load()) - 1
        if not self._n_records:
            raise UserError(f"{path} holds no record")
        if all(_suffix(part) in _SHOWN for i in range(self._n_records) for part in self._parts(i)):
            raise UserError(
                f"{path} holds media and no texts; where annotations name them, it may be their root"
            )
        kinds = sorted(
            {_NUMBER.sub("#", part) for i in range(min(100, self._n_records)) for part in self._parts(i)}
        )
        self.layout = f"{path.parent}: {' '.join(kinds)}"

    def __len__(self) -> int:
        return self._n_records

    def read(self, number: int) -> bytes:
        """Record `number` (from 0).

        Raises:
            Problem: its parts cannot be read, or do not belong together.
        """
        self._load()
        assert self._index is not None, "as loaded"
        return json.dumps(_Record(self._index, self._parts(number), self._fields).content()).encode()

    def close(self) -> None:
        """Let the index go, until it is read again."""
        self._index, self._members, self._bounds = None, _NONE, np.zeros(1, np.int64)

    def _load(self) -> np.ndarray:
        """Where the members of each record begin among those of all, int64 [records + 1]."""
        if self._index is None:
            energon = self._energon
            known = energon.members if energon else None
            self._index = index_archive(self._path, "tar", self._cache, known)
            takes = partial(energon.takes, self._path) if energon else None
            self._members, self._bounds = _grouped(self._index, takes)
        return self._bounds

    def _parts(self, number: int) -> _Parts:
        """The parts of a record."""
        assert self._index is not None, "as loaded"
        members = self._members[slice(*self._bounds[number : number + 2])].tolist()
        return {_base_and_part(self._index.name(member))[1]: member for member in members}


def shard_description(path: Path) -> str:
    """What the records of an archive follow from beside it: Energon's description of its folder."""
    energon = energon_folder_of(path)
    if energon is None:
        return ""
    name = os.path.relpath(os.path.abspath(path), energon.folder)
    excluded = sorted(one for one in energon.excluded if one.startswith(name))
    return repr((energon.fields, excluded))


def _grouped(index: ArchiveIndex, takes: Callable[[str], bool] | None) -> tuple[np.ndarray, np.ndarray]:
    """The members of each record, in the order of the records' first ones, and where each record begins.

    16 bytes a member at most: an archive may have millions.

    Args:
        takes: whether the record of a base name is one; None: all are.
    """
    members, names = array("q"), array("Q")
    for number in range(len(index)):
        base, part = _base_and_part(index.name(number))
        if part and (takes is None or takes(base)):
            members.append(number)
            digest = hashlib.blake2b(base.encode(errors="surrogateescape"), digest_size=8).digest()
            names.append(int.from_bytes(digest))
    _, first, record = np.unique(np.array(names, np.uint64), return_index=True, return_inverse=True)
    order = np.argsort(first[record], kind="stable")  # a record is named by its first member
    begins = np.flatnonzero(np.diff(first[record][order], prepend=-1))
    bounds = np.append(begins, len(order))
    return np.array(members, np.int64)[order], bounds


def _base_and_part(name: str) -> tuple[str, str]:
    """The base name of a member with its folder, and what part it is; nothing for one of no record."""
    folder, _, file = name.rpartition("/")
    base, _, part = file.partition(".")
    if not base or base.startswith("__") or not part:
        return "", ""
    return f"{folder}/{base}" if folder else base, part


class _Record:
    """One record out of its parts."""

    def __init__(self, index: ArchiveIndex, parts: _Parts, fields: Sequence[PartField]):
        self._index, self._parts, self._fields = index, parts, fields
        self._left = dict(parts)  # those that nothing has used yet

    def content(self) -> dict[str, Any]:
        """The record as one of the dialects.

        Raises:
            Problem: a part cannot be read, or it is not plain which media are meant.
        """
        if self._fields:
            return self._described()
        record = self._json()
        if not self._replace_names(record):
            self._add_media(record)
        self._add_caption(record)
        for part in self._left:
            kind = _suffix(part)
            if kind in _PICKLES:
                raise Problem("unsafe media", f"the part {part} is a Python pickle, which is never read")
            record.setdefault("audio" if kind in _AUDIO else part, f"a part of {self._index.file}")
        return record

    def _described(self) -> dict[str, Any]:
        """The record where somebody has said which parts become what; the others are of no use then."""
        record: dict[str, Any] = {}
        for field in self._fields:
            found = next((choice for choice in field.parts if choice[0] in self._parts), None)
            if found is None:
                continue
            part, steps = found
            if not steps and _suffix(part) in PICTURES | _VIDEOS:
                record.setdefault(field.key, []).append(self._address(part))
                continue
            value: Any = self._utf8(part)
            if steps or _suffix(part) == "json":
                value = _step_into(value, part, steps)
            if field.key == "answer" and isinstance(value, list) and len(value) == 1:
                value = value[0]
            record[field.key] = value
        return record

    def _json(self) -> dict[str, Any]:
        names = [part for part in self._parts if _suffix(part) == "json"]
        name = "json" if "json" in names else names[0] if len(names) == 1 else ""
        if not name:
            return {}
        raw = self._text(name).removeprefix(codecs.BOM_UTF8)
        del self._left[name]
        if raw.lstrip()[:1] == b"[":
            raw = b'{"conversations": ' + raw + b"}"
        record = parse_record(raw)
        texts = record.get("texts")
        if isinstance(texts, list) and texts and all(isinstance(t, dict) and _ROLE & t.keys() for t in texts):
            record["messages"] = record.pop("texts")
        return record

    def _replace_names(self, record: dict[str, Any]) -> bool:
        """Let the record's own names of media be addresses, where they are names of its parts.

        Returns:
            Whether there are any.
        """
        known: dict[str, str] = {}
        for part, number in self._parts.items():
            name = self._index.name(number)
            known |= dict.fromkeys((part, name, os.path.basename(name)), part)
        found = False

        def walk(value: Any, is_medium: bool) -> Any:
            nonlocal found
            if isinstance(value, str):
                part = known.get(value.removeprefix("./")) if is_medium else None
                found = found or part is not None
                return value if part is None else self._address(part)
            if isinstance(value, list):
                return [walk(item, is_medium) for item in value]
            if isinstance(value, dict):
                return {key: walk(inner, key in _MEDIA) for key, inner in value.items()}
            return value

        changed = {key: walk(value, key in _MEDIA) for key, value in record.items()}
        record.update(changed)
        return found

    def _add_media(self, record: dict[str, Any]) -> None:
        """Let the parts that are media stand beside the text.

        Raises:
            Problem: the record names others, and not one in place of one.
        """
        for key, kinds in (("image", PICTURES), ("video", _VIDEOS), ("document", frozenset(("pdf",)))):
            own = sorted((part for part in self._left if _suffix(part) in kinds), key=in_order)
            if key == "image":
                own = self._ordered(record, own)
            if not own:
                continue
            named = [name for one in (key, f"{key}s") for name in _listed(record.pop(one, None))]
            if named and (len(named), len(own)) != (1, 1):
                said, there = (", ".join(map(str, names))[:80] for names in (named, own))
                raise Problem("bad media reference", f"the record names {said}; its parts are {there}")
            record[f"{key}s"] = [self._address(part) for part in own]

    def _ordered(self, record: dict[str, Any], pictures: list[str]) -> list[str]:
        """Pictures in the order that the record gives them, if it does.

        Raises:
            Problem: it names one that is not there.
        """
        key = next((key for key in _ORDERS if isinstance(record.get(key), list)), None)
        if key is None or not pictures:
            return pictures
        found = []
        for name in record.pop(key):
            fits = [part for part in pictures if name in (part, part.rpartition(".")[0])]
            if len(fits) != 1:
                raise Problem(
                    "bad media reference", f"{key} names {name!r}; its parts are {', '.join(pictures)}"
                )
            found += fits
        return found

    def _add_caption(self, record: dict[str, Any]) -> None:
        """Text beside media is their caption, where the record has no words of its own."""
        name = next((part for part in _CAPTIONS if part in self._left), None)
        if name is None or not (record.get("images") or record.get("videos")):
            return
        text = self._utf8(name)
        if "caption" not in record and not _is_told(record):
            record["caption"] = text
        if record.get("caption") == text:
            del self._left[name]

    def _address(self, part: str) -> str:
        self._left.pop(part, None)
        return self._index.address(self._parts[part])

    def _utf8(self, part: str) -> str:
        try:
            return self._text(part).decode()
        except UnicodeDecodeError as error:
            raise Problem("broken text", f"the part {part} is not UTF-8 at byte {error.start}") from None

    def _text(self, part: str) -> bytes:
        number = self._parts[part]
        if self._index.size(number) > _MAX_TEXT:
            raise Problem("too long", f"the part {part} has {self._index.size(number):,} bytes of text")
        if not self._index.size(number):
            return b""
        with open_bytes(self._index.address(number)) as file:
            return file.read()


def _step_into(text: str, part: str, steps: Sequence[str]) -> Any:
    """A value in a part of JSON.

    Raises:
        Problem: it is not there.
    """
    try:
        value = json.loads(text)
        for step in steps:
            value = value[int(step)] if isinstance(value, list) else value[step]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise Problem("broken JSON", f"the part {part} has no {''.join(f'[{s}]' for s in steps)}") from None
    return value


def _is_told(record: Mapping[str, Any]) -> bool:
    """Whether a record is of some dialect as it is."""
    try:
        tell(record)
    except Problem:
        return False
    return True


def _suffix(part: str) -> str:
    return part.rpartition(".")[2].lower()


def _listed(value: object) -> list[Any]:
    return [] if value in (None, "", [], [""]) else value if isinstance(value, list) else [value]

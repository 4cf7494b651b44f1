"""The records of an annotation file, each by its number: JSON lines, an array, a table, an archive.

JSON may be packed; the rows of tables are read by `tables`, archives by `shards`.

A JSON file is scanned once for where its records begin, in blocks; what is kept of it are 8 bytes a record.
A packed file is unpacked into a temporary one, which is gone when it is closed.
"""

import codecs
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np

from megatron_eagle.data.annotations.shards import TarRecords, shard_description
from megatron_eagle.data.annotations.tables import ArrowTable, ParquetTable
from megatron_eagle.data.media.archive_scan import archive_kind
from megatron_eagle.data.media.archive_unpack import UNPACKING_ERRORS, unpacked_stream
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

ANNOTATION_SUFFIXES = tuple(
    f".{kind}{packing}" for kind in ("jsonl", "json", "ndjson") for packing in ("", ".gz", ".zst")
)
"""What names a JSON file of annotations where a folder is given."""
SHARD_SUFFIX = ".tar"
"""What names an archive there, if there is nothing else."""
TABLE_SUFFIXES = (".parquet", ".arrow")
"""What names a table there."""
_BLOCK = 1 << 20
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_RECORD_BEGINS = re.compile(rb'^\s*[\[{]\s*["{\[]', re.MULTILINE)
# Files that are named as annotations by mistake, by how they begin.
_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it (an archive of media may be the root)",
    b"\xff\xfe": "text in UTF-16; write it in UTF-8",
    b"\xfe\xff": "text in UTF-16; write it in UTF-8",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself; run git lfs pull",
}
_TABLES: dict[bytes, type[ParquetTable | ArrowTable]] = {
    b"PAR1": ParquetTable,
    b"ARROW1": ArrowTable,
    b"\xff\xff\xff\xff": ArrowTable,  # a stream's first message
}
_STEP = np.zeros(256, np.int64)  # what a byte outside of strings does to the depth
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_IS_MARK = _STEP != 0
_IS_MARK[ord(",")] = True


class RecordSource(Protocol):
    """Records in their order.  Whatever holds them, a sample is named by its file and its number."""

    @property
    def form(self) -> str:
        """What the file is, in words."""
        ...

    @property
    def in_workers(self) -> bool:
        """Whether whoever works on a record reads it too, from its file and by its number: where a record
        brings its media along."""
        ...

    @property
    def layout(self) -> str:
        """What all its records look like, if the file says so; files of one layout have the same keys."""
        ...

    def __len__(self) -> int: ...

    def read(self, number: int) -> bytes:
        """Record `number` (from 0) as JSON.

        Raises:
            Problem: it cannot be read, and others can.
        """
        ...

    def close(self) -> None:
        """Let the file go."""
        ...


class JsonFile:
    """The records of a JSON file; open only while it is read.

    Raises:
        UserError: it cannot be read, or is no such file.
    """

    in_workers = False
    layout = ""

    def __init__(self, path: Path):
        self._path = path
        self._file: BinaryIO | None = None
        file, packing = self._open()
        try:
            if other := _other_kind(file):
                raise UserError(f"{path} is {other}")
            begin, first = _first_byte(file)
            if first == b"[":
                self.form = "JSON array"
                self._bounds, self._gap = _array_bounds(file, begin, path), 1
            elif first == b"{" and _first_line(file, begin) == b"{":
                raise UserError(f"{path} is one JSON object; records are lines, or the elements of an array")
            else:
                self.form = "JSON lines"
                self._bounds, self._gap = _line_bounds(file), 0
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        finally:
            self.close()
        self.form += f", {packing}" if packing else ""

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, number: int) -> bytes:
        """The bytes of record `number` (from 0)."""
        file = self._file or self._open()[0]
        start, end = self._bounds[number : number + 2].tolist()
        file.seek(start + self._gap)
        return file.read(end - start - self._gap)

    def close(self) -> None:
        """Let the file go, until it is read again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> tuple[BinaryIO, str]:
        """Open the file, unpacked; and how it is packed."""
        try:
            self._file, packing = _unpacked(self._path)
        except UNPACKING_ERRORS as error:
            raise UserError(
                f"cannot read {self._path}: {getattr(error, 'strerror', None) or error}"
            ) from None
        return self._file, packing


def open_records(path: Path, cache: Path | None = None) -> RecordSource:
    """The records of an annotation file, of whatever kind.

    Args:
        cache: where the index of an archive is kept (None: nowhere).

    Raises:
        UserError: the file is unreadable, or holds something else.
    """
    table, is_shard = _told(path)
    if is_shard:
        return TarRecords(path, cache)
    if table:
        return table(path)
    source = JsonFile(path)
    if path.suffix.lower() in TABLE_SUFFIXES:
        raise UserError(f"{path} is named as a table and holds none; fetch it again")
    return source


def description(path: Path) -> str | None:
    """What the records of a file that may hold their media too follow from beside it; None for other files.

    Raises:
        UserError: it cannot be read.
    """
    table, is_shard = _told(path)
    if is_shard:
        return shard_description(path)
    return "" if table else None


def _told(path: Path) -> tuple[type[ParquetTable | ArrowTable] | None, bool]:
    """Which kind of table a file is by how it begins, and whether it is a tar archive."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
        kind = next((kind for magic, kind in _TABLES.items() if head.startswith(magic)), None)
        return kind, kind is None and archive_kind(path) == "tar"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def numbered(source: RecordSource) -> Iterator[tuple[int, bytes | Problem]]:
    """All records with their numbers, from 1; what cannot be read is its problem."""
    for number in range(len(source)):
        try:
            yield number + 1, source.read(number)
        except Problem as problem:
            yield number + 1, problem
    source.close()


def _unpacked(path: Path) -> tuple[BinaryIO, str]:
    """The file, unpacked, and how it was packed."""
    file = path.open("rb")
    head = file.read(4)
    file.seek(0)
    packing = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
    if not packing:
        return file, ""
    # Not beside the annotations, where nobody may be allowed to write.
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    try:
        with file, unpacked_stream(file, packing) as stream:
            shutil.copyfileobj(stream, unpacked, _BLOCK)
    except BaseException:
        unpacked.close()
        raise
    return unpacked, packing


def _other_kind(file: BinaryIO) -> str:
    """What a file is that holds no JSON, and what to do; nothing if it may hold some."""
    file.seek(0)
    head = file.read(65536)
    for begin, kind in _OTHERS.items():
        if head.startswith(begin):
            return kind
    if head[257:].startswith(b"ustar"):
        return "a packed tar archive; unpack it to a plain one, which is read as it is"
    # JSON writes zeros as \u0000; a single broken line is a line of the ledger.
    binary = b"\0" in head and not _RECORD_BEGINS.search(head)
    return "a binary file; annotations are JSON lines or a JSON array" if binary else ""


def _first_byte(file: BinaryIO) -> tuple[int, bytes]:
    """Where the text begins, behind a byte order mark and white space, and its first byte."""
    file.seek(0)
    head = file.read(65536)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    begin = start + len(head[start:]) - len(head[start:].lstrip())
    return begin, head[begin : begin + 1]


def _first_line(file: BinaryIO, begin: int) -> bytes:
    file.seek(begin)
    return file.readline(_BLOCK).strip()


def _line_bounds(file: BinaryIO) -> np.ndarray:
    """Byte offsets of lines, int64 [lines + 1]: line i (from 0) ends where line i + 1 begins."""
    parts = [np.zeros(1, np.int64)]
    offset = file.seek(0)
    while block := file.read(_BLOCK):
        parts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset + 1)
        offset += len(block)
    bounds = np.concatenate(parts)
    return bounds if bounds[-1] == offset else np.append(bounds, offset)


def _array_bounds(file: BinaryIO, begin: int, path: Path) -> np.ndarray:
    """Where an array opens, its commas are and it closes: int64 [n + 1].

    Raises:
        UserError: an array without an end, or with something behind it.
    """
    scan, found = _ArrayScan(), [np.array([begin], np.int64)]
    offset, rest = file.seek(begin), b""
    while not scan.ended:
        new = file.read(_BLOCK)
        if not new:
            n, last = sum(map(len, found)), found[-1][-1]
            raise UserError(
                f"{path} is cut off or broken: its JSON array does not end; "
                f"element {n}, from byte {last + 1} on, is the last that is whole or broken"
            )
        block = rest + new
        whole = block.rstrip(b"\\")  # what is escaped may be in the next block
        rest = block[len(whole) :]
        if len(places := scan.places(whole)):
            found.append(places + offset)
        offset += len(whole)
    offset = int(found[-1][-1]) + 1
    file.seek(offset)
    while block := file.read(_BLOCK):
        if block.strip():
            raise UserError(f"{path} has more text behind the end of its JSON array, at byte {offset}")
    bounds = np.concatenate(found)
    if len(bounds) == 2:
        file.seek(begin + 1)
        if not file.read(int(bounds[1]) - begin - 1).strip():
            return bounds[:1]  # [] has no element
    return bounds


class _ArrayScan:
    """Goes through an array block by block; its first byte is the bracket that opens it."""

    def __init__(self) -> None:
        self.ended = False
        self._in_string, self._depth = 0, 0

    def places(self, block: bytes) -> np.ndarray:
        """Where the array's own commas are in the next block, and the bracket that closes it."""
        data = np.frombuffer(block, np.uint8)
        quotes = np.flatnonzero(data == ord('"'))
        behind = np.flatnonzero((quotes > 0) & (data[quotes - 1] == ord("\\")))
        escaped = [i for i in behind.tolist() if _backslashes(block, int(quotes[i])) % 2]
        quotes = np.delete(quotes, escaped)
        marks = np.flatnonzero(_IS_MARK[data])
        marks = marks[(np.searchsorted(quotes, marks) + self._in_string) % 2 == 0]
        chars = data[marks]
        depths = self._depth + np.cumsum(_STEP[chars])
        ends = np.flatnonzero(depths == 0)
        if len(ends):
            self.ended = True
            chars, depths = chars[: ends[0] + 1], depths[: ends[0] + 1]
        own = (chars == ord(",")) & (depths == 1)
        own[len(own) - 1 :] |= self.ended
        self._in_string = (self._in_string + len(quotes)) % 2
        self._depth = int(depths[-1]) if len(depths) else self._depth
        places: np.ndarray = marks[: len(own)][own]
        return places


def _backslashes(block: bytes, end: int) -> int:
    """How many stand right before a place."""
    start = end
    while start and block[start - 1] == ord("\\"):
        start -= 1
    return end - start


def is_annotation(path: Path) -> bool:
    """Whether a file of a folder counts as annotations, by its name."""
    name = path.name.lower()
    aside = name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
    aside = aside or (name.startswith("cache-") and name.endswith(".arrow"))  # what `datasets` has computed
    suffixes = (*ANNOTATION_SUFFIXES, *TABLE_SUFFIXES)
    return name.endswith(suffixes) and not name.startswith(".") and not aside and os.path.isfile(path)

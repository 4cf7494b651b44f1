"""Where the bytes of a picture come from: a file, or a value of an LMDB database.

A picture in a database is named `lmdb://FILE?KEY`, with FILE as it is and KEY percent-encoded, wherever a
path is kept.
"""

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from megatron_eagle.data.ledger import Problem

_SCHEME = "lmdb://"


@dataclass(frozen=True)
class FileFacts:
    """A media file as it was when it was probed: bytes and time of its last change (nanoseconds)."""

    path: str
    size: int
    mtime_ns: int


def database_picture(file: str, key: str) -> str:
    """The name of the picture under `key` in the LMDB database `file`."""
    return f"{_SCHEME}{file}?{quote(key, safe='')}"


def file_facts(path: str) -> FileFacts:
    """Size and time of change of a file, or of a value and its database.  Raises `Problem` if missing."""
    if path.startswith(_SCHEME):
        return FileFacts(path, len(_value(path)), _status(_data_file(_split(path)[0])).st_mtime_ns)
    status = _status(path)
    return FileFacts(path, status.st_size, status.st_mtime_ns)


def open_media(path: str) -> BinaryIO | Path:
    """What a reader of pictures can open; a file is not opened here.

    Raises `Problem` for a missing or empty file or value, and for a pickle: reading one runs what it says.
    """
    if not path.startswith(_SCHEME):
        if _status(path).st_size == 0:
            raise Problem("empty file", path)
        return Path(path)
    value = _value(path)
    if not value:
        raise Problem("empty file", path)
    if value[0] == 0x80 and value[-1:] == b".":  # the PROTO opcode of protocol 2 and above, and STOP
        raise Problem(
            "unsafe media", f"{path} is a Python pickle, which is never read; store the picture file"
        )
    return io.BytesIO(value)


def _status(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except OSError:
        raise Problem("missing media", path) from None


def _split(path: str) -> tuple[str, str]:
    file, _, key = path.removeprefix(_SCHEME).rpartition("?")
    return file, unquote(key)


def _data_file(file: str) -> str:
    return os.path.join(file, "data.mdb") if os.path.isdir(file) else file


def _value(path: str) -> bytes:
    file, key = _split(path)
    _status(file)
    with _environment(file).begin() as transaction:
        value = transaction.get(key.encode())
    if value is None:
        raise Problem("missing media", f"{file} has no key {key!r}")
    return value


@lru_cache(maxsize=64)
def _environment(file: str) -> Any:
    """The open database; a process may open one only once."""
    try:
        import lmdb
    except ImportError:
        raise Problem("lmdb not installed", f"{file} needs it: pip install lmdb") from None
    try:
        return lmdb.open(file, subdir=os.path.isdir(file), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise Problem("unreadable image", f"{file}: {error}") from None

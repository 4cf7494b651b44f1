"""Pictures that are values of an LMDB database: `lmdb://FILE?KEY`, FILE as it is, KEY percent-encoded."""

import io
import os
import threading
from functools import lru_cache
from typing import Any, BinaryIO
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from megatron_eagle.data.media.addresses.base import (
    FileMetadata,
    content_fingerprint,
    file_status,
    open_value,
)
from megatron_eagle.problems import Problem

_SCHEME = "lmdb://"
_OPENING = threading.Lock()
_IN_USE: WeakValueDictionary[str, Any] = WeakValueDictionary()


def database_picture(file: str, key: str) -> str:
    """The name of the picture under `key` in the LMDB database `file`."""
    return f"{_SCHEME}{file}?{quote(key, safe='')}"


class Databases:
    """See `AddressKind`."""

    def metadata(self, path: str) -> FileMetadata:
        """Size of the value, time of change of its database."""
        return FileMetadata(path, len(_value(path)), file_status(_data_file(_split(path)[0])).st_mtime_ns)

    def fingerprint(self, path: str) -> int:
        """See `content_fingerprint`."""
        value = _value(path)
        return content_fingerprint(io.BytesIO(value), len(value))

    def open(self, path: str) -> BinaryIO:
        """The value.

        Raises:
            Problem: also for a pickle: reading one runs what it says.
        """
        value = _value(path)
        if value[:1] == b"\x80" and value[-1:] == b".":  # the PROTO opcode of protocol 2 and above, and STOP
            raise Problem(
                "unsafe media", f"{path} is a Python pickle, which is never read; store the picture file"
            )
        return open_value(value, path)


def _split(path: str) -> tuple[str, str]:
    file, _, key = path.removeprefix(_SCHEME).rpartition("?")
    return file, unquote(key)


def _data_file(file: str) -> str:
    return os.path.join(file, "data.mdb") if os.path.isdir(file) else file


def _value(path: str) -> bytes:
    file, key = _split(path)
    file_status(file)
    with _environment(file).begin() as transaction:
        value: bytes | None = transaction.get(key.encode())
    if value is None:
        raise Problem("missing media", f"{file} has no key {key!r}")
    return value


def _environment(file: str) -> Any:
    """The open database; a process may open one only once, so that threads wait for each other."""
    with _OPENING:
        return _opened(os.path.realpath(file))


@lru_cache(maxsize=64)
def _opened(file: str) -> Any:
    if (in_use := _IN_USE.get(file)) is not None:  # by a thread, while 64 others were opened
        return in_use
    try:
        import lmdb
    except ImportError:
        raise Problem("lmdb not installed", f"{file} needs it: pip install lmdb") from None
    try:
        opened = lmdb.open(file, subdir=os.path.isdir(file), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise Problem("unreadable image", f"{file}: {error}") from None
    _IN_USE[file] = opened
    return opened

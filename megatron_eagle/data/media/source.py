"""Where a medium comes from: a file, a value of an LMDB database, a page of a PDF file, pictures as frames.

Wherever a path is kept, a picture in a database is named `lmdb://FILE?KEY`, with FILE as it is and KEY
percent-encoded, and a page of a document that is drawn at W x H pixels is `pdf://FILE?page=NUMBER&size=WxH`.
A video of pictures is named as `frame_list` says.
"""

import hashlib
import io
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

from megatron_eagle.data.media.frame_list import frame_pictures
from megatron_eagle.problems import Problem

_SCHEME = "lmdb://"
_HASHED_BYTES = 65536  # of each of three places
_OPENING = threading.Lock()
_IN_USE: WeakValueDictionary[str, Any] = WeakValueDictionary()
_PAGE = re.compile(r"pdf://(?P<file>.+)\?page=(?P<number>\d+)&size=(?P<width>\d+)x(?P<height>\d+)", re.DOTALL)


@dataclass(frozen=True)
class FileMetadata:
    """A media file as it was when it was probed: bytes and time of its last change (nanoseconds)."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class PageRef:
    """Page `number` (from 0) of a PDF file, drawn at `width` x `height` pixels."""

    file: str
    number: int
    width: int
    height: int

    def __str__(self) -> str:
        """Its name, in which pages are numbered from 1."""
        return f"pdf://{self.file}?page={self.number + 1}&size={self.width}x{self.height}"


def page_ref(path: str) -> PageRef | None:
    """The page that `path` names, or None if it names none."""
    match = _PAGE.fullmatch(path)
    return match and PageRef(
        match["file"], int(match["number"]) - 1, int(match["width"]), int(match["height"])
    )


def database_picture(file: str, key: str) -> str:
    """The name of the picture under `key` in the LMDB database `file`."""
    return f"{_SCHEME}{file}?{quote(key, safe='')}"


def file_metadata(path: str) -> FileMetadata:
    """Size and time of change of a file, of the file a page is in, or of a value and its database; of the
    pictures of a video all bytes and the last change.

    Raises:
        Problem: it is missing.
    """
    if pictures := frame_pictures(path):
        files = [file_metadata(picture) for picture in pictures.values()]
        return FileMetadata(path, sum(file.size for file in files), max(file.mtime_ns for file in files))
    if path.startswith(_SCHEME):
        return FileMetadata(path, len(_value(path)), _status(_data_file(_split(path)[0])).st_mtime_ns)
    page = page_ref(path)
    status = _status(page.file if page else path)
    return FileMetadata(path, status.st_size, status.st_mtime_ns)


def fingerprint(path: str) -> int:
    """64 bits of a hash of a file's size, beginning, middle and end; of the pictures of a video whole files.

    Raises:
        Problem: it is missing.
    """
    if pictures := frame_pictures(path):
        whole = hashlib.blake2b(digest_size=8)
        for picture in pictures.values():
            media = open_media(picture)
            whole.update(media.read_bytes() if isinstance(media, Path) else media.read())
        return int.from_bytes(whole.digest(), signed=True)
    size = _status(path).st_size
    digest = hashlib.blake2b(size.to_bytes(8), digest_size=8)
    try:
        with open(path, "rb") as file:
            for start in (0, size // 2, max(0, size - _HASHED_BYTES)):
                file.seek(start)
                digest.update(file.read(_HASHED_BYTES))
    except OSError as error:
        raise Problem("missing media", f"{path}: {error.strerror}") from None
    return int.from_bytes(digest.digest(), signed=True)


def check_unchanged(path: str, probed: FileMetadata, known_fingerprint: int) -> None:
    """Let pass the file that was probed; a copy of it with another date is that file.

    Raises:
        Problem: it is another one.
    """
    now = check_size(path, probed.size)
    if now.mtime_ns != probed.mtime_ns and fingerprint(path) != known_fingerprint:
        raise Problem("media changed since preprocessing", f"{path} has other content")


def check_size(path: str, size: int) -> FileMetadata:
    """A file as it is now.

    Raises:
        Problem: it does not have the bytes that it was probed with.
    """
    now = file_metadata(path)
    if now.size != size:
        raise Problem("media changed since preprocessing", f"{path} has {now.size} bytes, had {size}")
    return now


def open_media(path: str) -> BinaryIO | Path:
    """What a reader of pictures can open; a file is not opened here.

    Raises:
        Problem: a missing or empty file or value, and for a pickle: reading one runs what it says.
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

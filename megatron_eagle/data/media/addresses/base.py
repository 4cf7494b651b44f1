"""What a medium is told by, and what every kind of address offers."""

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from megatron_eagle.data.media import hints
from megatron_eagle.problems import Problem

_HASHED_BYTES = 65536  # of each of three places


@dataclass(frozen=True)
class FileMetadata:
    """A medium as it was when it was probed: bytes and time of its file's last change (nanoseconds)."""

    path: str
    size: int
    mtime_ns: int


class AddressKind(Protocol):
    """Media of one kind of address; safe in many threads and after a fork."""

    def metadata(self, path: str) -> FileMetadata:
        """Size and time of change.

        Raises:
            Problem: the medium is missing.
        """
        ...

    def fingerprint(self, path: str) -> int:
        """64 bits that stand for the content (`content_fingerprint`).

        Raises:
            Problem: the medium is missing.
        """
        ...

    def open(self, path: str) -> BinaryIO | Path:
        """A file that holds the medium alone, which is not opened here, or its bytes, seekable.

        Raises:
            Problem: the medium is missing or empty.
        """
        ...


def file_status(path: str) -> os.stat_result:
    """The status of a file.

    Raises:
        Problem: it is missing.
    """
    try:
        return os.stat(path)
    except (OSError, ValueError):
        raise Problem("missing media", f"{path}{hints.of_missing(path)}") from None


def content_fingerprint(file: BinaryIO, size: int) -> int:
    """64 bits of a hash of a medium's size, beginning, middle and end, wherever its bytes are."""
    digest = hashlib.blake2b(size.to_bytes(8), digest_size=8)
    for start in (0, size // 2, max(0, size - _HASHED_BYTES)):
        file.seek(start)
        digest.update(file.read(_HASHED_BYTES))
    return int.from_bytes(digest.digest(), signed=True)


def open_value(value: bytes, path: str) -> BinaryIO:
    """A medium that is in memory as a whole.

    Raises:
        Problem: it is empty.
    """
    if not value:
        raise Problem("empty file", path)
    return io.BytesIO(value)

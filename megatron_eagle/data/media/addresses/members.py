"""Parts of larger files, read where they lie: `tar://FILE?offset=N&size=M`, likewise `arrow://`, and
`zip://FILE?offset=N&size=M&crc=C`.

FILE is as it is; N is where the member's bytes begin in it, M how many there are, C their CRC-32; in an Arrow
file they are a value of a column.  What is compressed in a zip archive has no such bytes: `unzip://` with the
same is unpacked in memory whenever it is read; N is where its header begins, M and C are of what comes out.
"""

import io
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, BinaryIO

from megatron_eagle.data.media.addresses.base import FileMetadata, content_fingerprint, file_status
from megatron_eagle.problems import Problem

_MEMBER = re.compile(
    r"(?P<kind>tar|zip|unzip|arrow)://(?P<file>.+)\?offset=(?P<offset>\d+)&size=(?P<size>\d+)"
    r"(?:&crc=(?P<crc>[0-9a-f]{8}))?",
    re.DOTALL,
)
_OPEN_ARCHIVES = 64  # at a time, beside those that are being read
_WITH_CRC = {True: ("zip", "unzip"), False: ("tar", "zip", "arrow")}
_WHOLE = 1 << 20  # bytes up to which a member is read at once
_CHECKED = 1 << 25  # the same of a member that has a checksum; larger ones are checked when they are probed
_BUFFER = 1 << 16
# Of a tar header (POSIX ustar): its length, and where the member's size is in it.
_HEADER, _SIZE_AT, _SIZE_LENGTH = 512, 124, 12
ZIP_HEADER = 30
"""Bytes of a member's own header in a zip archive, before its name."""
_OTHERWISE = 1 << 33  # a size from which on it may stand elsewhere


@dataclass(frozen=True)
class MemberRef:
    """`size` bytes from `offset` on of a file.

    `kind` is tar, arrow, zip or unzip; the last two have a `crc`, but for zip in older stores.
    """

    kind: str
    file: str
    offset: int
    size: int
    crc: int | None = None

    def __str__(self) -> str:
        crc = "" if self.crc is None else f"&crc={self.crc:08x}"
        return f"{self.kind}://{self.file}?offset={self.offset}&size={self.size}{crc}"


@lru_cache(maxsize=4096)
def member_ref(path: str) -> MemberRef | None:
    """The member that `path` names, or None if it names none."""
    match = _MEMBER.fullmatch(path)
    if match is None or match["kind"] not in _WITH_CRC[match["crc"] is not None]:
        return None
    crc = int(match["crc"], 16) if match["crc"] else None
    return MemberRef(match["kind"], match["file"], int(match["offset"]), int(match["size"]), crc)


class Members:
    """See `AddressKind`.

    Raises:
        Problem: by all methods, where the archive ends before the member does.
    """

    def metadata(self, path: str) -> FileMetadata:
        """Size of the member, time of change of its archive."""
        member, status = _found(path)
        return FileMetadata(path, member.size, status.st_mtime_ns)

    def fingerprint(self, path: str) -> int:
        """That of a file with the same content."""
        member, status = _found(path)
        archive = _archive(member.file, status)
        if member.kind == "zip" and member.size > _CHECKED:
            _check_sum(member, iter(partial(_MemberFile(archive, member).read, _WHOLE), b""))
        with _bytes(archive, member) as file:
            return content_fingerprint(file, member.size)

    def open(self, path: str) -> BinaryIO:
        """The member's bytes.

        Raises:
            Problem: also where a tar archive holds no member of this size at this place any more.
        """
        member, status = _found(path)
        if member.size == 0:
            raise Problem("empty file", path)
        archive = _archive(member.file, status)
        if member.kind == "tar":
            _check_header(archive, member)
        return _bytes(archive, member)


def zip_data_offset(header: bytes, offset: int) -> int:
    """Where a member's bytes begin behind its own header in a zip archive, which begins at `offset`.

    Raises:
        Problem: there is no such header.
    """
    if not header.startswith(b"PK\x03\x04") or len(header) < ZIP_HEADER:
        raise Problem("media changed since preprocessing", f"no member begins at byte {offset}")
    return offset + ZIP_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))


class _Archive:
    """An open archive, which is closed when nobody uses it any more."""

    def __init__(self, file: str):
        try:
            self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.descriptor = -1
            raise Problem("missing media", f"{file}: {error.strerror}") from None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _MemberFile(io.RawIOBase):
    """A member as a file of its own.

    It keeps its own position and reads at places, so that others may read the same archive meanwhile, in
    threads and in forked processes.
    """

    def __init__(self, archive: _Archive, member: MemberRef):
        super().__init__()
        self._archive, self._start, self._size = archive, member.offset, member.size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"a negative place {begin + offset}")
        self._at = begin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer).cast("B") as view, view[: max(0, self._size - self._at)] as wanted:
            n = os.preadv(self._archive.descriptor, [wanted], self._start + self._at) if wanted else 0
        self._at += n
        return n

    def readall(self) -> bytes:
        parts = []
        while (left := self._size - self._at) > 0:
            part = os.pread(self._archive.descriptor, left, self._start + self._at)
            if not part:
                break
            parts.append(part)
            self._at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _bytes(archive: _Archive, member: MemberRef) -> BinaryIO:
    if member.kind == "unzip":
        return io.BytesIO(_unpacked(archive, member))
    file = _MemberFile(archive, member)
    if member.size > (_WHOLE if member.crc is None else _CHECKED):
        return io.BufferedReader(file, _BUFFER)
    content = file.readall()
    _check_sum(member, [content])
    return io.BytesIO(content)


def _check_sum(member: MemberRef, parts: Iterable[bytes]) -> None:
    """Hold a stored member against its checksum, if it has one.

    Raises:
        Problem: it is damaged, or not the one that was indexed.
    """
    if member.crc is not None and reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0) != member.crc:
        raise Problem("broken archive", f"{member}: its bytes do not have the checksum that it says")


def _unpacked(archive: _Archive, member: MemberRef) -> bytes:
    """A compressed member, held against its size and its checksum.

    Raises:
        Problem: it is damaged, or not the one that was indexed.
    """
    header = os.pread(archive.descriptor, ZIP_HEADER, member.offset)
    try:
        at = zip_data_offset(header, member.offset)
    except Problem as problem:
        raise Problem(problem.kind, f"{member}: {problem.detail}") from None
    inflater, parts, left = zlib.decompressobj(-zlib.MAX_WBITS), [], member.size
    try:
        while left >= 0 and not inflater.eof and (packed := os.pread(archive.descriptor, _WHOLE, at)):
            at += len(packed)
            parts.append(inflater.decompress(packed, left + 1))
            left -= len(parts[-1])
    except zlib.error as error:
        raise Problem("broken archive", f"{member}: {error}") from None
    content = b"".join(parts)
    if not inflater.eof or len(content) != member.size or zlib.crc32(content) != member.crc:
        raise Problem("broken archive", f"{member}: what comes out is not what it says")
    return content


def _found(path: str) -> tuple[MemberRef, os.stat_result]:
    """The member, and its archive's status."""
    member = member_ref(path)
    if member is None:
        raise Problem("missing media", f"{path} is no place in an archive")
    status = file_status(member.file)
    end = member.offset + (ZIP_HEADER if member.kind == "unzip" else member.size)
    if end > status.st_size:
        raise Problem(
            "media changed since preprocessing",
            f"{path} ends at byte {end}, the archive at {status.st_size}",
        )
    return member, status


def _archive(file: str, status: os.stat_result) -> _Archive:
    return _opened(file, status.st_dev, status.st_ino)


@lru_cache(maxsize=_OPEN_ARCHIVES)
def _opened(file: str, device: int, inode: int) -> _Archive:  # noqa: ARG001
    """The open archive; one that takes another's place has another inode."""
    return _Archive(file)


def _check_header(archive: _Archive, member: MemberRef) -> None:
    """Hold the size in the header before a member against its address.

    Raises:
        Problem: they differ.
    """
    at = member.offset - _HEADER + _SIZE_AT
    digits = os.pread(archive.descriptor, _SIZE_LENGTH, at) if at >= 0 else b""
    if digits[:1] == b"\x80":  # GNU's way for large ones
        size = int.from_bytes(digits[1:])
    else:
        digits = digits.split(b"\0")[0].strip()
        size = int(digits, 8) if digits.isdigit() and not digits.translate(None, b"01234567") else -1
    if size != member.size and member.size < _OTHERWISE:
        raise Problem("media changed since preprocessing", f"{member}: no such member begins there")

"""Where a medium comes from, by its address: one string, wherever a path is kept.

The table `_KINDS` has a kind of address for each scheme (see `addresses`); what has none of them is a file.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_eagle.data.media.addresses.base import AddressKind, FileMetadata
from megatron_eagle.data.media.addresses.databases import Databases, database_picture
from megatron_eagle.data.media.addresses.elsewhere import Elsewhere
from megatron_eagle.data.media.addresses.files import Files
from megatron_eagle.data.media.addresses.inline import Inline, is_inline
from megatron_eagle.data.media.addresses.members import MemberRef, Members, member_ref
from megatron_eagle.data.media.addresses.pages import PageRef, page_ref
from megatron_eagle.data.media.addresses.rows import RowRef, RowValues, row_ref
from megatron_eagle.data.media.frame_list import frame_pictures
from megatron_eagle.problems import Problem

__all__ = [
    "FileMetadata",
    "MemberRef",
    "PageRef",
    "RowRef",
    "check_size",
    "check_unchanged",
    "database_picture",
    "file_metadata",
    "is_inline",
    "fingerprint",
    "member_ref",
    "open_bytes",
    "open_media",
    "page_ref",
    "row_ref",
]


def file_metadata(path: str) -> FileMetadata:
    """Size and time of change of a medium: of the file that it or its page is in, of a value and its
    database, of a member and its archive; of the pictures of a video all bytes and the last change.

    Raises:
        Problem: it is missing.
    """
    return _kind(path).metadata(path)


def fingerprint(path: str) -> int:
    """64 bits of a hash of a medium's size, beginning, middle and end; of the pictures of a video wholly.

    Raises:
        Problem: it is missing.
    """
    return _kind(path).fingerprint(path)


def open_media(path: str) -> BinaryIO | Path:
    """What a reader can open: a file, which is not opened here, or bytes in which it can seek.

    Raises:
        Problem: the medium is missing or empty, or is not safe to read.
    """
    return _kind(path).open(path)


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """A medium's bytes, in which one can seek.

    Raises:
        Problem: as `open_media`.
        OSError: its file cannot be opened.
    """
    media = open_media(path)
    with media.open("rb") if isinstance(media, Path) else media as file:
        yield file


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


class _Pages:
    """Pages of a document are as old as its file, and have its size."""

    def metadata(self, path: str) -> FileMetadata:
        file = file_metadata(_document(path))
        return FileMetadata(path, file.size, file.mtime_ns)

    def fingerprint(self, path: str) -> int:
        return fingerprint(_document(path))

    def open(self, path: str) -> BinaryIO | Path:
        return open_media(_document(path))


def _document(path: str) -> str:
    page = page_ref(path)
    return page.file if page else path.removeprefix("pdf://")


class _FrameLists:
    """Videos whose frames are given one by one: see `frame_list`."""

    def metadata(self, path: str) -> FileMetadata:
        files = [file_metadata(picture) for picture in frame_pictures(path).values()]
        return FileMetadata(path, sum(file.size for file in files), max(file.mtime_ns for file in files))

    def fingerprint(self, path: str) -> int:
        whole = hashlib.blake2b(digest_size=8)
        for picture in frame_pictures(path).values():
            with open_bytes(picture) as file:
                whole.update(file.read())
        return int.from_bytes(whole.digest(), signed=True)

    def open(self, path: str) -> Path:
        raise Problem("unreadable video", f"{path} has no file of its own")


_FILES, _MEMBERS, _INLINE = Files(), Members(), Inline()
_KINDS: Mapping[str, AddressKind] = {
    "lmdb": Databases(),
    "tar": _MEMBERS,
    "zip": _MEMBERS,
    "unzip": _MEMBERS,
    "arrow": _MEMBERS,
    "parquet": RowValues(),
    "pdf": _Pages(),
    "frames": _FrameLists(),
    **dict.fromkeys(("s3", "gs", "hf", "https", "http"), Elsewhere()),
}


def _kind(path: str) -> AddressKind:
    if is_inline(path):
        return _INLINE
    scheme, found, _ = path.partition("://")
    return _KINDS.get(scheme, _FILES) if found else _FILES

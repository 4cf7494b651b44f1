"""The store's own media: what can be read quickly only once, in plain tar files, each content once in a file.

D/media/00000.tar, ...: members are named by a hash of their content; rows name them relative to the store,
`tar://media/00000.tar?offset=N&size=M`, so that it can be moved.  Media are added in the order of the input,
and how far the files count is two numbers, so that a run that was killed goes on there with the same bytes.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from megatron_eagle.data.media.source import MemberRef, open_bytes
from megatron_eagle.data.store.media_names import FOLDER, renamed
from megatron_eagle.data.store.reader import Plan, SampleColumns
from megatron_eagle.files import sync

MEDIA_FILE_BYTES = 1 << 30
"""A medium that would make a file larger begins the next one."""
_SHARD_MEMBERS = 1 << 16
_END = bytes(2 * tarfile.BLOCKSIZE)
Position = tuple[int, int]
"""The number of a file, and its bytes without the end mark."""


class MediaFiles:
    """Adds media to the files in `folder`, a store that is being made.

    What lies beyond `position` is cut off.
    """

    def __init__(self, folder: Path, position: Position = (0, 0), shard_bytes: int = MEDIA_FILE_BYTES):
        self._folder, self._shard_bytes = folder / FOLDER, shard_bytes
        self._number, self._size = position
        self._file: IO[bytes] | None = None
        self._known: dict[bytes, int] = {}  # where the contents of the last file begin, by their hashes
        for number, path in _shards(self._folder):
            if number > self._number or position == (0, 0):
                path.unlink()
        if position == (0, 0) and self._folder.is_dir():
            self._folder.rmdir()
        if self._size:
            self._open().truncate(self._size)
            with tarfile.open(self._path, "r:") as archive:
                for member in archive:
                    self._known[bytes.fromhex(member.name)] = member.offset_data

    @property
    def position(self) -> Position:
        """How far the files count by now."""
        return self._number, self._size

    def add(self, content: bytes) -> str:
        """The name, relative to the store, under which a medium is found from now on."""
        name = hashlib.blake2b(content, digest_size=16).digest()
        if (known := self._known.get(name)) is not None:
            return self._address(known, content)
        padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        size = tarfile.BLOCKSIZE + padded
        if self._size and (self._size + size > self._shard_bytes or len(self._known) >= _SHARD_MEMBERS):
            self.finish()
            self._number, self._size = self._number + 1, 0
            self._known.clear()
        member = tarfile.TarInfo(name.hex())
        member.size = len(content)
        file = self._open()
        for part in (member.tobuf(tarfile.GNU_FORMAT), content, bytes(padded - len(content))):
            file.write(part)
        self._known[name] = self._size + tarfile.BLOCKSIZE
        self._size += size
        return self._address(self._known[name], content)

    def sync(self) -> None:
        """Have everything on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            sync(self._folder)

    def finish(self) -> None:
        """Close the last file with its end mark."""
        if self._size:
            self._open().write(_END)
        self.close()

    def close(self) -> None:
        """Leave the files for a later run, which takes them up at its position."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._number:05d}.tar"

    def _address(self, offset: int, content: bytes) -> str:
        return str(MemberRef("tar", f"{FOLDER}/{self._path.name}", offset, len(content)))

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            self._file = self._path.open("r+b" if self._size else "wb")
            self._file.seek(self._size)
        return self._file


def holds(folder: Path, position: Position) -> bool:
    """Whether the files of a store that is being made reach as far as a position says."""
    number, size = position
    there = dict(_shards(folder / FOLDER))
    return not size or (there.keys() >= set(range(number + 1)) and there[number].stat().st_size >= size)


def _shards(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("*.tar")):
        if path.stem.isdecimal():
            yield int(path.stem), path


def taken_over(
    columns: SampleColumns, files: MediaFiles, foreign: Callable[[str], bool], names: dict[str, str]
) -> SampleColumns:
    """A row whose media lie in the store's own files; those that are `foreign` are added to them.

    Their time of change is 0: they do not change, and the same input gives the same row.

    Args:
        names: of media that the sample's other rows have brought along, by where they came from; added to.
    """

    def own(path: str) -> str:
        if path not in names:
            with open_bytes(path) as file:
                names[path] = files.add(file.read())
        return names[path]

    def plan(medium: Plan) -> Plan:
        path = renamed(medium.path, own, foreign)
        return medium if path == medium.path else replace(medium, path=path, mtime_ns=0)

    return replace(columns, images=tuple(map(plan, columns.images)), videos=tuple(map(plan, columns.videos)))

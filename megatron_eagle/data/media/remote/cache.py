"""A folder of fetched files that many processes share: whole files only, never more bytes than it may hold.

FOLDER/xx/KEY.SUFFIX     a file, whole; its time of change is the identity that it was fetched with, its time
                         of access that of its last use
FOLDER/xx/.*.partial     one that is being fetched, of its full length from the beginning
FOLDER/locks/xxx         held while a file whose key begins so is fetched, so that only one process does
FOLDER/bytes             how many there are; held while it changes

Whoever reads a file holds a shared lock on it, whoever writes one an exclusive lock: what is held is not
thrown away.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

_POLL = 0.02  # seconds
_SLACK = 10  # when room is made, a tenth of the limit is freed beyond it, so that not every file has to


class CacheError(UserError):
    """The folder cannot be written or read: no medium can be had."""


class HeldFile:
    """A file of the cache; it stays there until this is closed."""

    def __init__(self, path: str, descriptor: int):
        self.path, self._descriptor = path, descriptor

    def __enter__(self) -> "HeldFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let it go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class MediaCache:
    """See the module; safe in many threads and processes of a machine.

    `patience` is how many seconds are waited for others: for room that they hold, for a file that they fetch.

    Raises:
        CacheError: the folder cannot be written, or its file system does not keep times or locks.
    """

    def __init__(self, folder: str | Path, limit: int, patience: float = 60.0):
        self._folder, self._limit, self._patience = Path(folder), limit, patience
        self._locks, self._bytes = self._folder / "locks", self._folder / "bytes"
        with self._said_plainly():
            self._locks.mkdir(parents=True, exist_ok=True)
            self._check_file_system()

    def find(self, key: str, suffix: str = "") -> HeldFile | None:
        """The file of this key, if it is there."""
        path = self._path(key, suffix)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"the cache {self._folder}: {error.strerror}") from None
        held = HeldFile(str(path), descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:  # it may have been thrown away before it was locked
            status = os.stat(path)
            if os.path.samestat(status, os.fstat(descriptor)):
                with suppress(OSError):  # a cache that may only be read has no last use
                    os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
                return held
        except FileNotFoundError:
            pass
        held.close()
        return None

    @contextmanager
    def fetching(self, key: str) -> Iterator[None]:
        """Wait until nobody else fetches the file of this key; but not for ever."""
        with self._said_plainly():
            lock = (self._locks / key[:3]).open("ab")
        with lock:
            _wait(lambda: _lock(lock.fileno()), self._patience)
            yield

    def put(
        self, key: str, suffix: str, size: int, date: int, write: Callable[[Callable[[bytes], None]], None]
    ) -> HeldFile:
        """Put a file into its place when all of it is there.

        Args:
            date: its time of change, in nanoseconds.
            write: is given a function that takes the bytes, in pieces.

        Raises:
            Problem: the cache is too small, or others hold all that is in it.
            CacheError: the disk is full or refuses.
            Exception: whatever `write` raises; nothing is left then.
        """
        if size > self._limit:
            raise Problem(
                "cache too small", f"{self._folder} holds {self._limit:,} bytes, the medium has {size:,}"
            )
        path = self._path(key, suffix)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        try:
            with self._said_plainly():
                path.parent.mkdir(exist_ok=True)
                with self._room(size, partial) as file:  # held until it has its name
                    try:
                        _fill(file, write)
                        os.utime(file.fileno(), ns=(time.time_ns(), date))
                        os.fsync(file.fileno())
                    except BaseException:
                        with self._counted() as counter:
                            partial.unlink(missing_ok=True)
                            counter.value -= size
                        raise
                    with self._counted() as counter:  # who counts files meets it under one name
                        counter.value -= path.stat().st_size if path.exists() else 0
                        partial.replace(path)
        except _Foreign as error:
            raise error.args[0] from None
        held = self.find(key, suffix)
        if held is None:
            raise Problem(
                "cache too small", f"{self._folder}: {path.name} was thrown away before it was read"
            )
        return held

    def _room(self, size: int, partial: Path) -> BinaryIO:
        """A new file that counts with its full length from now on."""
        end = time.monotonic() + self._patience
        while (file := self._claim(size, partial)) is None:
            if time.monotonic() > end:
                raise Problem(
                    "cache too small", f"{self._folder}: all of its {self._limit:,} bytes are in use"
                )
            time.sleep(_POLL)
        return file

    def _claim(self, size: int, partial: Path) -> BinaryIO | None:
        with self._counted() as counter:
            if counter.value + size > self._limit:
                counter.value = self._make_room(size)
            if counter.value + size > self._limit:
                return None
            file = partial.open("wb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(file.fileno(), size)
            except BaseException:
                partial.unlink(missing_ok=True)
                file.close()
                raise
            counter.value += size
            return file

    def _make_room(self, size: int) -> int:
        """Throw away what was not used for longest; returns how many bytes are left."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        total = sum(entry.size for entry in entries)
        wanted = max(0, self._limit - size - self._limit // _SLACK)
        for entry in entries:
            if total <= wanted:
                break
            if _throw_away(entry.path):
                total -= entry.size
        return total

    def _entries(self) -> Iterator["_Entry"]:
        for folder in os.scandir(self._folder):
            if not folder.is_dir() or folder.name == "locks":
                continue
            for file in os.scandir(folder.path):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    used = 0 if file.name.endswith(".partial") else status.st_atime_ns
                    yield _Entry(file.path, status.st_size, used)

    @contextmanager
    def _counted(self) -> Iterator["_Counter"]:
        """The number of bytes, which nobody else reads or changes meanwhile."""
        descriptor = os.open(self._bytes, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 32, 0).strip()
            before = int(text) if text.isdigit() else sum(entry.size for entry in self._entries())
            counter = _Counter(max(0, before))
            try:
                yield counter
            finally:
                os.pwrite(descriptor, b"%-24d\n" % max(0, counter.value), 0)
        finally:
            os.close(descriptor)

    def _path(self, key: str, suffix: str) -> Path:
        return self._folder / key[:2] / f"{key}{suffix}"

    def _check_file_system(self) -> None:
        date = 1_234_567_890_123_456_000
        with self._counted():
            os.utime(self._bytes, ns=(date, date))
            if os.stat(self._bytes).st_mtime_ns != date:
                raise CacheError(
                    f"the cache {self._folder}: its file system does not keep times to the microsecond"
                )

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"the cache {self._folder}: {error.strerror or error}; make room or choose another "
                "folder, and start again"
            ) from None


class _Foreign(Exception):
    """An error of whoever is read from, `args[0]`: it is none of our own disk."""


def _fill(file: BinaryIO, write: Callable[[Callable[[bytes], None]], None]) -> None:
    disk: list[OSError] = []

    def take(piece: bytes) -> None:
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            disk.append(error)
            raise

    try:
        write(take)
    except Exception as error:
        raise disk[0] if disk else _Foreign(error) from None


@dataclass
class _Counter:
    value: int


@dataclass(frozen=True)
class _Entry:
    path: str
    size: int
    used: int


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it is done within that time."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


def _throw_away(path: str) -> bool:
    """Whether nobody held it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not _lock(descriptor):
            return False
        with suppress(FileNotFoundError):
            os.unlink(path)
        return True
    finally:
        os.close(descriptor)

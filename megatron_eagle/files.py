"""Files that a killed run finds again: whole or not at all; JSON lines, of which a kill may have cut one."""

import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def beside(path: Path, mark: str = "", durable: bool = True) -> Iterator[Path]:
    """Where to write what becomes `path` once it is complete; an error leaves `path` as it was.

    Args:
        mark: goes into the name beside it, where several processes may write one file at the same time.
        durable: on the disk before it gets its name, so that no loss of power leaves half of it there.

    Raises:
        OSError: it cannot be written, or not get its name.
    """
    partial = path.with_name(f".{path.name}{mark}.partial")
    try:
        with _naming(path):
            yield partial
            if durable:
                sync(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file so that it is there completely or not at all, whatever happens to the process.

    Several processes may write it at once.

    Raises:
        OSError: it cannot be written; the file is then what it was.
    """
    with beside(path, f".{os.getpid()}", durable) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write JSON lines, as `write_whole`."""
    with beside(path, f".{os.getpid()}") as partial, partial.open("wb") as file:
        file.writelines(map(to_line, records))


def append_line(path: Path, record: Any) -> None:
    """Add a JSON line to a file to which other processes add theirs.

    A line that one of them could not finish spoils no other.

    Raises:
        OSError: it cannot be written.
    """
    with _naming(path), open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        line = to_line(record) if file.read(1) in (b"", b"\n") else b"\n" + to_line(record)
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def to_line(record: Any) -> bytes:
    """A line of JSON. Names of files that are no Unicode are escaped, and read back as they were."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


class AppendedFile:
    """A file to which each `write` adds all of its bytes at once.

    Raises:
        OSError: by `write`, which then has added nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._end = self._file.tell()
        self._torn = False

    def write(self, data: bytes) -> None:
        self._mend()
        self._torn, rest = True, memoryview(data)
        with _naming(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._end += len(data)
        self._torn = False

    def __enter__(self) -> "AppendedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            self._mend()
        finally:
            self._file.close()

    def _mend(self) -> None:
        """Take back the bytes of a write that failed halfway."""
        if self._torn:
            self._file.truncate(self._end)
            self._torn = False


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing, which the system gives no name, get that of the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Return when the disk has the file, or the names in the folder.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None for anything else, as what a kill left of one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in the lines of a file; none if it does not exist. Other lines are passed over."""
    if not path.exists():
        return []
    return [record for line in path.read_bytes().split(b"\n") if (record := parse_line(line)) is not None]


def split_lines(text: str) -> list[str]:
    """The lines of a text. Unlike those of `str.splitlines` they end at line feeds alone: what else ends a
    line, a text in a line of JSON may hold."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def from_record(kind: type[T], record: Mapping[str, Any]) -> T:
    """The dataclass `kind` out of a file that a later version may have written: fields that `kind` does not
    know are left out.

    Raises:
        TypeError: where one that it needs is missing.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is one
    return kind(**{name: value for name, value in record.items() if name in known})


def nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there, in which it would be made."""
    return next(above for above in (folder.absolute(), *folder.absolute().parents) if above.is_dir())

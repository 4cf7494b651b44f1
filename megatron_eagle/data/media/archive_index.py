"""An archive's index: its members' names and places, found once, kept in a file, looked up by name.

The file is an Arrow stream; a large one is mapped, so that all processes of a machine share it.  It lies
where its user says, since an archive's own folder may be read-only, and stands for an archive of one size and
date.
"""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_eagle.data.media.addresses.base import file_status
from megatron_eagle.data.media.addresses.members import ZIP_HEADER, zip_data_offset
from megatron_eagle.data.media.archive_scan import Member, scan
from megatron_eagle.data.media.source import MemberRef
from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.problems import Problem

_MAPPED = 1 << 23  # bytes from which on an index is mapped
_FORM = "3"  # of the file
_SCHEMA = pa.schema(
    [
        ("name", pa.large_binary()),
        ("place", pa.int64()),
        ("size", pa.int64()),
        ("refused", pa.large_binary()),
        ("crc", pa.int64()),
        ("packed", pa.bool_()),
        ("by_name", pa.int64()),
    ]
)


class ArchiveIndex:
    """The members of the archive `file`, a tar or zip one (`kind`), by their numbers in its order."""

    def __init__(self, file: str, kind: str, table: pa.Table):
        self.file, self.kind = file, kind
        columns = {name: table[name].combine_chunks() for name in _SCHEMA.names}
        self._names, self._refused, self._packed = (columns[name] for name in ("name", "refused", "packed"))
        self._places, self._sizes, self._crcs, self._by_name = (
            np.asarray(columns[name]) for name in ("place", "size", "crc", "by_name")
        )

    def __len__(self) -> int:
        return len(self._places)

    def name(self, number: int) -> str:
        """A member's name."""
        return str(self._names[number].as_py().decode(errors="surrogateescape"))

    def find(self, name: str) -> int | None:
        """The number of the member with a name, or None."""
        wanted = name.encode(errors="surrogateescape")
        rank = self._rank(wanted)
        found = rank < len(self) and self._name_at(rank) == wanted
        return int(self._by_name[rank]) if found else None

    def below(self, folder: str) -> Iterator[int]:
        """The numbers of the members in a folder and its folders, in the order of their names."""
        prefix = f"{folder}/".encode(errors="surrogateescape")
        for rank in range(self._rank(prefix), len(self)):
            if not self._name_at(rank).startswith(prefix):
                break
            yield int(self._by_name[rank])

    def size(self, number: int) -> int:
        """Bytes of a member."""
        return int(self._sizes[number])

    def refused(self, number: int) -> str:
        """Why a member cannot be read where it lies, or nothing."""
        return str(self._refused[number].as_py().decode(errors="surrogateescape"))

    def address(self, number: int) -> str:
        """Where a member's bytes are.

        Raises:
            Problem: they cannot be read there, or the archive has changed.
        """
        if refused := self.refused(number):
            raise Problem("unsupported media", f"{self.name(number)} in {self.file} is {refused}")
        place, size = int(self._places[number]), self.size(number)
        if self.kind == "tar":
            return str(MemberRef("tar", self.file, place, size))
        crc = int(self._crcs[number])
        if self._packed[number].as_py():
            return str(MemberRef("unzip", self.file, place, size, crc))
        return str(MemberRef("zip", self.file, _behind_header(self.file, place), size, crc))

    def _name_at(self, rank: int) -> bytes:
        return bytes(self._names[int(self._by_name[rank])].as_py())

    def _rank(self, name: bytes) -> int:
        return bisect_left(range(len(self)), name, key=self._name_at)


def index_archive(
    archive: Path,
    kind: str,
    folder: Path | None,
    known: Callable[[Path], list[Member] | None] | None = None,
) -> ArchiveIndex:
    """The index of a tar or zip archive: that in `folder` if it fits, else a new one, which is kept there.

    Args:
        known: what may know the archive's members already.

    Raises:
        UserError: the archive is damaged or cut off, or the index cannot be written.
    """
    file = os.path.abspath(archive)
    metadata = _identity(file, kind)
    kept = None if folder is None else index_file(archive, folder)
    if kept is not None and (table := _read(kept, metadata)) is not None:
        return ArchiveIndex(file, kind, table)
    members = (known(archive) if known else None) or scan(archive, kind)
    table = _table(members).replace_schema_metadata(metadata)
    if kept is not None:
        _write(kept, table)
        table = _read(kept, metadata) or table  # mapped, where possible
    return ArchiveIndex(file, kind, table)


def index_file(archive: Path, folder: Path) -> Path:
    """Where the index of an archive is kept in a folder."""
    name = hashlib.blake2b(os.fsencode(os.path.abspath(archive))).hexdigest()[:24]
    return folder / f"{name}.arrow"


def _identity(file: str, kind: str) -> dict[str, str]:
    try:
        status = file_status(file)
    except Problem as problem:
        raise UserError(str(problem)) from None
    of_file = {"file": os.fsencode(file).hex(), "kind": kind}
    return {"form": _FORM, **of_file, "size": str(status.st_size), "mtime_ns": str(status.st_mtime_ns)}


def _table(members: Sequence[Member]) -> pa.Table:
    names = [member.name.encode(errors="surrogateescape") for member in members]
    columns = [
        names,
        [member.place for member in members],
        [member.size for member in members],
        [member.refused.encode(errors="surrogateescape") for member in members],
        [member.crc for member in members],
        [member.packed for member in members],
        sorted(range(len(names)), key=names.__getitem__),
    ]
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
    )


def _read(path: Path, metadata: dict[str, str]) -> pa.Table | None:
    """The index in a file, if it is that of an archive with this identity."""
    try:
        # A map takes a file descriptor as long as it is used.
        is_large = path.stat().st_size > _MAPPED
        source = pa.memory_map(str(path)) if is_large else pa.py_buffer(path.read_bytes())
        table = pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowException):
        return None
    found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return table if found == metadata and table.schema.equals(_SCHEMA) else None


def _write(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, sink.getvalue().to_pybytes(), durable=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _behind_header(file: str, place: int) -> int:
    """Where the bytes of a member begin whose header in a zip archive begins at `place`."""
    try:
        with open(file, "rb", buffering=0) as archive:
            archive.seek(place)
            return zip_data_offset(archive.read(ZIP_HEADER), place)
    except OSError as error:
        raise Problem("missing media", f"{file}: {error.strerror}") from None
    except Problem as problem:
        raise Problem(problem.kind, f"{file}: {problem.detail}") from None

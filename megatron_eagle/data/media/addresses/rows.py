"""Values in the rows of parquet files: `parquet://FILE?row=N&value=STEP/...`.

FILE is as it is, rows and list elements count from 0, steps are percent-encoded names or numbers.  Rows are
read a few megabytes at a time, in their order, so that memory does not grow with files and row groups; a row
before the last few is reached through its row group from the beginning.
"""

import io
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_eagle.data.media.addresses.base import (
    FileMetadata,
    content_fingerprint,
    file_status,
    open_value,
)
from megatron_eagle.problems import Problem

_VALUE = re.compile(r"parquet://(?P<file>.+)\?row=(?P<row>\d+)&value=(?P<value>[^?&]+)", re.DOTALL)
BROKEN_TABLE = "broken table"
_NO_TEXT = "the name of a column is not UTF-8"
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1024
_KEPT_BYTES = 16 << 20  # of the batches that were read last, or two batches where rows are larger
_BUFFER = 1 << 20
_OPEN_TABLES = 2  # of which each keeps batches


@dataclass(frozen=True)
class RowRef:
    """The value in a row (from 0) of a parquet file to which `steps` lead: column, then names or numbers."""

    file: str
    row: int
    steps: tuple[str | int, ...]

    def __str__(self) -> str:
        steps = (quote(str(step), safe="") for step in self.steps)
        return f"parquet://{self.file}?row={self.row}&value={'/'.join(steps)}"


def row_ref(path: str) -> RowRef | None:
    """The value that `path` names, or None if it names none."""
    match = _VALUE.fullmatch(path)
    return match and RowRef(match["file"], int(match["row"]), tuple(map(unquote, match["value"].split("/"))))


def check_columns(schema: pa.Schema) -> None:
    """Let pass a table whose columns can be told apart by their names.

    Raises:
        pa.ArrowInvalid: a name is no text, or several columns have it, of which a row would hold the last.
    """
    try:
        names = schema.names
    except UnicodeDecodeError:
        raise pa.ArrowInvalid(_NO_TEXT) from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise pa.ArrowInvalid(f"several columns have the name {twice}")


class ParquetRows:
    """The rows of a parquet file; safe in several threads.

    Raises:
        OSError: it cannot be opened.
        pa.ArrowException: it is no parquet file, or is cut off.
    """

    def __init__(self, path: str):
        self._path = path
        self._lock = threading.Lock()
        try:
            self._file = pq.ParquetFile(
                path, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True
            )
        except UnicodeDecodeError:
            raise pa.ArrowInvalid(_NO_TEXT) from None
        check_columns(self._file.schema_arrow)
        metadata = self._file.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._bounds = np.cumsum([0, *(group.num_rows for group in groups)])
        self._bytes = [group.total_byte_size for group in groups]
        self._kept: OrderedDict[int, pa.RecordBatch] = OrderedDict()  # by their first rows
        self._stream: Iterator[pa.RecordBatch] = iter(())
        self._next, self._end = 0, 0  # rows that the stream has still to give
        self._broken: dict[int, tuple[int, str]] = {}  # of groups: the first row that is not read, and why

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    @property
    def n_groups(self) -> int:
        return len(self._bounds) - 1

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def find(self, row: int) -> tuple[pa.RecordBatch, int]:
        """A batch that has a row, and the row's place in it.

        Raises:
            Problem: it cannot be read.
        """
        if not 0 <= row < len(self):
            raise Problem("missing media", f"{self._path} has no row {row}")
        with self._lock:
            for start, batch in reversed(self._kept.items()):
                if start <= row < start + len(batch):
                    return batch, row - start
            if not self._next <= row < self._end:
                self._begin(row)
            while True:
                start, batch = self._next, self._take()
                self._next += len(batch)
                if self._next == self._end:
                    self._stream = iter(())  # it holds a page, and a dictionary as large as 1,024 rows
                if row < self._next:
                    return batch, row - start

    def _begin(self, row: int) -> None:
        """Let the stream give the row group of a row, from its beginning."""
        group = int(np.searchsorted(self._bounds, row, side="right")) - 1
        first, end = self._bounds[group : group + 2].tolist()
        if first in self._broken and row >= self._broken[first][0]:
            raise Problem(BROKEN_TABLE, self._broken[first][1])
        n = max(1, min(_BATCH_ROWS, _BATCH_BYTES * (end - first) // max(1, self._bytes[group])))
        self._stream = self._file.iter_batches(n, [group], use_threads=False)
        self._next, self._end = first, end

    def _take(self) -> pa.RecordBatch:
        try:
            batch = next(self._stream)
        except (OSError, pa.ArrowException, StopIteration) as error:
            first = int(self._bounds[np.searchsorted(self._bounds, self._next, side="right") - 1])
            reason = (str(error).splitlines() or ["it has fewer rows than it promises"])[0]
            self._broken[first] = self._next, f"{self._path}, from row {self._next + 1} on: {reason}"
            self._stream, self._next, self._end = iter(()), 0, 0
            raise Problem(BROKEN_TABLE, self._broken[first][1]) from None
        self._kept[self._next] = batch
        self._kept.move_to_end(self._next)
        while len(self._kept) > 2 and sum(b.nbytes for b in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return batch


def open_rows(path: str) -> ParquetRows:
    """The rows of a file, which stays open while it is one of the last few.

    Raises:
        OSError: it cannot be opened.
        pa.ArrowException: it is no parquet file, or is cut off.
    """
    status = file_status(path)
    return _opened(path, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=_OPEN_TABLES)
def _opened(path: str, inode: int, mtime_ns: int) -> ParquetRows:  # noqa: ARG001
    return ParquetRows(path)


class RowValues:
    """See `AddressKind`."""

    def metadata(self, path: str) -> FileMetadata:
        """Size of the value, time of change of its file."""
        reference, value = _value(path)
        return FileMetadata(path, len(value), file_status(reference.file).st_mtime_ns)

    def fingerprint(self, path: str) -> int:
        """See `content_fingerprint`."""
        _, value = _value(path)
        return content_fingerprint(io.BytesIO(value), len(value))

    def open(self, path: str) -> BinaryIO:
        """The value."""
        _, value = _value(path)
        return open_value(value, path)


def _value(path: str) -> tuple[RowRef, bytes]:
    reference = row_ref(path)
    if reference is None:
        raise Problem("missing media", f"{path} names no value of a table")
    try:
        batch, place = open_rows(reference.file).find(reference.row)
    except (OSError, pa.ArrowException) as error:
        raise Problem(BROKEN_TABLE, f"{reference.file}: {str(error).splitlines()[0]}") from None
    try:
        value: Any = batch[reference.steps[0]][place]
        for step in reference.steps[1:]:
            value = value[int(step) if isinstance(value, pa.ListScalar) else step]
        found = value.as_py()
    except (KeyError, IndexError, TypeError, ValueError):
        found = None
    if not isinstance(found, bytes):
        raise Problem("missing media", f"{path} is no binary value")
    return reference, found

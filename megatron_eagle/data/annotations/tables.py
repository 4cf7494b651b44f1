"""The records of tables: the rows of parquet and Arrow files, as JSON in which media are named, not held.

A value of bytes becomes the address of where it lies; `{bytes, path}`, as `datasets` stores media, becomes
the address of its bytes, else its path.  Arrow files are mapped, and their media read where they lie.
"""

import io
import json
import os
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
from PIL import Image

from megatron_eagle.data.media.addresses.rows import BROKEN_TABLE, check_columns, open_rows
from megatron_eagle.data.media.source import MemberRef, RowRef
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

_Steps = tuple[str | int, ...]
_Name = Callable[[_Steps], str]


class ParquetTable:
    """See `RecordSource`.

    Raises:
        UserError: the file cannot be read.
    """

    in_workers = True

    def __init__(self, path: Path):
        self._path = os.path.abspath(path)  # whose addresses hold anywhere
        rows = self._rows()
        self._n_rows = len(rows)
        self.form = f"parquet, {rows.n_groups:,} row group{'s' * (rows.n_groups != 1)}"
        self.layout = str(rows.schema.remove_metadata())

    def __len__(self) -> int:
        return self._n_rows

    def read(self, number: int) -> bytes:
        """Row `number` (from 0)."""
        batch, place = self._rows().find(number)
        return _json(batch, place, lambda steps: str(RowRef(self._path, number, steps)))

    def close(self) -> None:
        """Nothing is held: open files are few, whoever reads them."""

    def _rows(self) -> Any:
        try:
            return open_rows(self._path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {self._path}: {_reason(error)}") from None


class ArrowTable:
    """See `RecordSource`: a stream, as `datasets` writes it, or a file.

    Raises:
        UserError: it cannot be read, or its buffers are compressed, so that a picture lies nowhere in it.
    """

    in_workers = True

    def __init__(self, path: Path):
        self._path = os.path.abspath(path)  # whose addresses hold anywhere
        self._mapped: _Mapped | None = None
        mapped = self._open()
        self._bounds = np.cumsum([0, *map(len, mapped.batches)])
        self.form = f"Arrow, {len(mapped.batches):,} batch{'es' * (len(mapped.batches) != 1)}"
        self.layout = str(mapped.schema.remove_metadata())
        buffers = (b for column in (mapped.batches[0] if mapped.batches else ()) for b in column.buffers())
        if not all(b is None or not b.size or mapped.offset(b) >= 0 for b in buffers):
            raise UserError(f"{path} is compressed; write it as parquet, or with save_to_disk of datasets")
        self.close()

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, number: int) -> bytes:
        """Row `number` (from 0)."""
        i = int(np.searchsorted(self._bounds, number, side="right")) - 1
        mapped = self._open()
        batch, place = mapped.checked(i), number - int(self._bounds[i])
        return _json(batch, place, lambda steps: self._address(mapped, batch, place, steps))

    def close(self) -> None:
        """Let the map go, until it is read again."""
        self._mapped = None

    def _open(self) -> "_Mapped":
        try:
            self._mapped = self._mapped or _Mapped(self._path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {self._path}: {_reason(error)}") from None
        return self._mapped

    def _address(self, mapped: "_Mapped", batch: pa.RecordBatch, place: int, steps: _Steps) -> str:
        array = batch[steps[0]]
        for step in steps[1:]:
            if isinstance(step, str):
                array = array.field(step)
            elif pa.types.is_fixed_size_list(array.type):
                array, place = array.values, (array.offset + place) * array.type.list_size + step
            elif pa.types.is_map(array.type):
                break
            else:
                array, place = array.values, array.offsets[place].as_py() + step
        if not pa.types.is_binary(array.type) and not pa.types.is_large_binary(array.type):
            raise Problem("unsupported media", f"{self._path} holds media as {array.type}")
        _, offsets, content = array.buffers()
        kind = np.int32 if pa.types.is_binary(array.type) else np.int64
        start, end = np.frombuffer(offsets, kind)[array.offset + place :][:2].tolist()
        at = mapped.offset(content.slice(start, end - start))
        return str(MemberRef("arrow", self._path, at, end - start))


class _Mapped:
    """The batches of an Arrow file, in the memory into which it is mapped."""

    def __init__(self, path: str):
        file = pa.memory_map(path)
        self._whole = file.read_buffer()
        try:
            reader = pa.ipc.open_file(file)
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            reader = pa.ipc.open_stream(self._whole)
            self.batches = list(reader)
        self.schema = reader.schema
        check_columns(self.schema)
        self._path = path
        self._whole_batches: set[int] = set()

    def checked(self, number: int) -> pa.RecordBatch:
        """A batch whose offsets lead nowhere else: what is mapped is not looked at before.

        Raises:
            Problem: it is damaged.
        """
        batch = self.batches[number]
        if number not in self._whole_batches:
            try:
                batch.validate(full=True)
            except pa.ArrowException as error:
                raise Problem(BROKEN_TABLE, f"{self._path}, batch {number + 1}: {_reason(error)}") from None
            self._whole_batches.add(number)
        return batch

    def offset(self, part: pa.Buffer) -> int:
        """Where a part of the file begins, or -1 if it is none."""
        offset = int(part.address - self._whole.address)
        return offset if 0 <= offset <= self._whole.size - part.size else -1


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _json(batch: pa.RecordBatch, place: int, name: _Name) -> bytes:
    """A row as a JSON object; `name` gives the address of a value of bytes."""
    try:
        row = batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Problem("broken text", f"not UTF-8: {error.reason}") from None
    record = {key: _listed(_plain(value, (key,), name)) for key, value in row.items()}
    for key in ("video", "videos"):
        if isinstance(row.get(key), list) and row[key] and all(map(_is_picture, row[key])):
            record[key] = [record[key]]  # the frames of one video
    return json.dumps(record, ensure_ascii=False).encode()


def _plain(value: Any, steps: _Steps, name: _Name) -> Any:
    if isinstance(value, bytes):
        return name(steps)
    if isinstance(value, dict):
        if "bytes" in value and value.keys() <= {"bytes", "path"}:
            held = value["bytes"] is not None
            return _plain(value["bytes"], (*steps, "bytes"), name) if held else value.get("path")
        return {key: _plain(inner, (*steps, key), name) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*steps, i), name) for i, inner in enumerate(value)]
    return str(value) if isinstance(value, date | time | timedelta | Decimal | UUID) else value


def _is_picture(value: object) -> bool:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        return False
    try:
        with Image.open(io.BytesIO(content)):
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _listed(value: Any) -> Any:
    """A column of objects that came as an object of columns, as older `datasets` store a sequence of them."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]

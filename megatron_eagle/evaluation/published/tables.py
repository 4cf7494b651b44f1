"""The rows of a benchmark's table, in every form that is downloaded."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eagle.data.annotations.tables import ParquetTable
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.published.tfrecord import read_examples
from megatron_eagle.files import split_lines
from megatron_eagle.problems import Problem

_ENCODING = "utf-8-sig"  # spreadsheets and Windows put a mark before the first character
_INDEX = 64  # characters up to which an `image` of a TSV is no picture


def read_table(path: Path) -> Iterator[Any]:
    """The rows of a parquet, TFRecord, TSV, JSON Lines, JSON or text file; in parquet media are addresses.
    A JSON file that is one object is one row.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        yield from _rows(path)
    except (OSError, ValueError, AttributeError, KeyError, csv.Error, Problem) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise UserError(f"{path}: cannot be read as a benchmark's table: {reason}") from None


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        table = ParquetTable(path)
        yield from (json.loads(table.read(number)) for number in range(len(table)))
    elif ".tfrecord" in path.name:
        yield from read_examples(path)
    elif path.suffix == ".tsv":
        yield from _tsv(path)
    elif path.suffix == ".jsonl":
        with path.open(encoding=_ENCODING) as file:
            yield from (json.loads(line) for line in file if line.strip())
    elif path.suffix == ".txt":
        yield from (line for line in split_lines(path.read_text(encoding=_ENCODING)) if line.strip())
    else:
        value = json.loads(path.read_text(encoding=_ENCODING))
        yield from value if isinstance(value, list) else [value]


def _tsv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a TSV; an `image` that is the index of another row, to save room, becomes that row's."""
    meant = {row["image"] for row in _lines(path) if _is_index(row)}
    held = {row["index"]: row["image"] for row in _lines(path) if row["index"] in meant} if meant else {}
    for row in _lines(path):
        yield row | {"image": held.get(row["image"], row["image"])} if _is_index(row) else row


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # pictures are fields
    with path.open(encoding=_ENCODING, newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")


def _is_index(row: dict[str, Any]) -> bool:
    return (
        bool(row.get("image")) and len(row["image"]) <= _INDEX and "index" in row and "." not in row["image"]
    )

"""Writing a token store: tokens as they come, then, from the rows of all samples, its tables and indexes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_eagle.data.store.reader import BATCH_ROWS, SCHEMA, SampleColumns
from megatron_eagle.data.store.token_file import TokenFileWriter, write_token_index


class StoreWriter:
    """Appends the samples of one length to the token files in `folder`.

    The first `n_tokens` tokens of files that are there already are kept, what follows them is cut off.
    """

    def __init__(self, folder: Path, n_tokens: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._tokens = TokenFileWriter(folder / "tokens", np.int32, n_tokens)
        self._answers = TokenFileWriter(folder / "answers", np.uint16, n_tokens)
        self._pending: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, answers: np.ndarray, columns: SampleColumns) -> None:
        """Append one sample."""
        self._tokens.add(ids)
        self._answers.add(answers)
        self._pending.append(asdict(columns))

    def take_rows(self) -> pa.Table:
        """The rows added since the last call; their tokens are on disk when it returns."""
        self._tokens.sync()
        self._answers.sync()
        rows = pa.Table.from_pylist(self._pending, SCHEMA)
        self._pending = []
        return rows

    def close(self) -> None:
        """Close the token files."""
        self._tokens.close()
        self._answers.close()


def write_tables(folder: Path, tables: Iterable[pa.Table], order: np.ndarray | None = None) -> None:
    """Write samples.arrow and the indexes of the token files, whose sequences are the rows of `tables`.

    The same rows give the same bytes, however they are divided into tables.  A batch of them is in memory,
    and a few numbers of each.

    Args:
        order: the rows of the store as numbers of these rows, repetitions included; None: as they are.
    """
    path = folder / "samples.arrow"
    lengths = [np.zeros(0, np.int32)]
    with _new_file(path) as out:
        for batch in _batches(tables):
            lengths.append(np.asarray(batch["n_tokens"]).astype(np.int32))
            out.write_table(batch)
    if order is not None:
        repeated = path.with_suffix(".new")
        with _new_file(repeated) as out, pa.OSFile(str(path), "rb") as file:
            rows = pa.ipc.open_file(file)
            for start in range(0, len(order), BATCH_ROWS):
                out.write_table(_rows(rows, order[start : start + BATCH_ROWS]))
        repeated.replace(path)
    for name, dtype in (("tokens", np.int32), ("answers", np.uint16)):
        write_token_index(folder / name, dtype, np.concatenate(lengths), order)


@contextmanager
def _new_file(path: Path) -> Iterator[pa.RecordBatchFileWriter]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as out:
        yield out


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows in tables of `BATCH_ROWS`, the last with the rest, each as if it had never been in pieces."""
    waiting = SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) >= BATCH_ROWS:
            yield _whole(waiting.slice(0, BATCH_ROWS))
            waiting = waiting.slice(BATCH_ROWS)
    if len(waiting):
        yield _whole(waiting)


def _rows(file: pa.RecordBatchFileReader, numbers: np.ndarray) -> pa.Table:
    """Some rows of a file of `_batches`, of which it reads the batches that have them."""
    batches, places = np.unique(numbers // BATCH_ROWS, return_inverse=True)
    table = pa.Table.from_batches([file.get_batch(batch) for batch in batches.tolist()])
    return table.take(places * BATCH_ROWS + numbers % BATCH_ROWS).combine_chunks()


def _whole(rows: pa.Table) -> pa.Table:
    rows = rows.combine_chunks()
    return rows.take(np.arange(len(rows)))

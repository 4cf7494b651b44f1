"""Writing a token store: tokens as they come, then, from the rows of all samples, its tables and indexes."""

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


def write_tables(folder: Path, rows: pa.Table, order: np.ndarray | None = None) -> None:
    """Write samples.arrow and the indexes of the token files, whose sequences are those of `rows`.

    The same rows give the same bytes, however they are chunked.

    Args:
        order: the rows of the store as numbers of `rows`, repetitions included; None: as they are.
    """
    path = folder / "samples.arrow"
    _write_batches(path, rows, None)
    if order is not None:
        repeated = path.with_suffix(".new")
        _write_batches(repeated, pa.ipc.open_file(pa.memory_map(str(path))).read_all(), order)
        repeated.replace(path)
    lengths = np.asarray(rows["n_tokens"]).astype(np.int32)
    for name, dtype in (("tokens", np.int32), ("answers", np.uint16)):
        write_token_index(folder / name, dtype, lengths, order)


def _write_batches(path: Path, rows: pa.Table, order: np.ndarray | None) -> None:
    n = len(rows) if order is None else len(order)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as out:
        for start in range(0, n, BATCH_ROWS):
            if order is None:
                batch = rows.slice(start, BATCH_ROWS).combine_chunks()
                batch = batch.take(np.arange(len(batch)))  # as if it had never been in several pieces
            else:
                batch = rows.take(order[start : start + BATCH_ROWS]).combine_chunks()
            out.write_table(batch)

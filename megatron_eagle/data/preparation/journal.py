"""What an interrupted run has finished: entries that appear whole or not at all, in the order of the input.

Tokens go straight into the files of the new store; an entry records the rows and ledger lines of some input
lines, and with them how long those files are as far as they count.  So a run that is killed at any point goes
on after its last entry, and what it had written beyond is cut off.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from megatron_eagle.data.store.media_files import Position
from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, sync
from megatron_eagle.problems import LedgerEntry


class Journal:
    """The entries of one run, in a folder of its own.

    `key` says what the run is about (see `cache_key`): entries of another one are thrown away, as with
    `fresh`.

    Raises:
        UserError: another process has the folder.
    """

    def __init__(self, folder: Path, key: str, fresh: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = lock_file(folder / "lock")
        key_file = folder / "key"
        if fresh or not key_file.is_file() or key_file.read_text() != key:
            self.clear()
            key_file.write_text(key)
        shutil.rmtree(folder / "new", ignore_errors=True)  # an entry that was being written
        self._entries: list[Path] = sorted(path for path in folder.iterdir() if path.is_dir())
        heads = [json.loads((path / "entry.json").read_text(encoding="utf-8")) for path in self._entries]
        self.n_lines: int = sum(head["n_lines"] for head in heads)
        """Input lines that are done."""
        self.dropped: list[LedgerEntry] = [
            from_record(LedgerEntry, line) for head in heads for line in head["dropped"]
        ]
        """Their ledger."""
        self.media: Position = tuple(heads[-1].get("media", (0, 0))) if heads else (0, 0)
        """How far the store's own media files count (see `store.media_files`)."""

    def tables(self, length: int) -> Iterator[pa.Table]:
        """The rows of one length so far, an entry at a time."""
        for path in self._entries:
            with pa.OSFile(str(path / f"{length}.arrow"), "rb") as file:
                yield pa.ipc.open_file(file).read_all()

    def column(self, length: int, name: str) -> np.ndarray:
        """A number of each of these rows: int64."""
        parts = [np.asarray(table[name]).astype(np.int64) for table in self.tables(length)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def n_tokens(self, length: int) -> int:
        """Tokens of one length so far."""
        return int(self.column(length, "n_tokens").sum())

    def commit(
        self, n_lines: int, dropped: list[LedgerEntry], rows: Mapping[int, pa.Table], media: Position = (0, 0)
    ) -> None:
        """Record the next `n_lines` input lines: their ledger and, per length, their rows.

        The tokens of the rows must be on disk before, and media as far as `media` says.
        """
        new = self._folder / "new"
        new.mkdir()
        for length, table in rows.items():
            with (
                pa.OSFile(str(new / f"{length}.arrow"), "wb") as sink,
                pa.ipc.new_file(sink, table.schema) as out,
            ):
                out.write_table(table)
        head = {"n_lines": n_lines, "dropped": [asdict(entry) for entry in dropped], "media": media}
        (new / "entry.json").write_text(json.dumps(head), encoding="utf-8")
        for path in (*new.iterdir(), new):
            sync(path)
        entry = self._folder / f"{len(self._entries):08d}"
        new.rename(entry)
        sync(self._folder)
        self._entries.append(entry)
        self.n_lines += n_lines
        self.dropped += dropped
        self.media = media

    def clear(self) -> None:
        """Begin again: nothing is done."""
        for path in sorted(
            self._folder.iterdir(), reverse=True
        ):  # the last first, should this be interrupted
            if path.is_dir():
                shutil.rmtree(path)
        self._entries, self.n_lines, self.dropped, self.media = [], 0, [], (0, 0)

    def remove(self) -> None:
        """Forget everything: the run is complete."""
        shutil.rmtree(self._folder)
        self._lock.close()

    def close(self) -> None:
        """Leave the entries for a later run."""
        self._lock.close()


def lock_file(path: Path) -> IO[bytes]:
    """Hold the file at `path` until it is closed or this process ends, in whatever way.

    Raises:
        UserError: another process holds it.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process is working in {path.parent}; wait for it or choose another --output"
        ) from None
    except OSError:  # a file system without locks: nothing to hold, nothing to fear but two runs at once
        pass
    return file

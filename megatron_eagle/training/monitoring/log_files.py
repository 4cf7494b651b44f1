"""The files that a run appends to: what a resume keeps of them, and writes that a full disk cannot tear."""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_eagle.files import AppendedFile, parse_line, write_whole

T = TypeVar("T")
Point = tuple[int, Mapping[str, float]]  # iteration, values by name


class Dropped(NamedTuple):
    """What `drop_repeated` has found."""

    iterations: int  # that had lines, and are about to be repeated
    unreadable: int  # lines that are kept


def drop_repeated(path: Path, iteration: int) -> Dropped:
    """Leave out of a JSONL file what a run that goes on after `iteration` is about to write again, and a last
    line that was cut by a kill.

    All other lines stay byte for byte: also those of later versions, and damaged ones. The file is replaced
    whole.

    Raises:
        OSError: it cannot be written; it is then what it was.
    """
    kept, unreadable, repeated = [], 0, set()
    content = path.read_bytes() if path.exists() else b""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        record = parse_line(line)
        if not line or (record is None and number == len(lines)):
            continue
        unreadable += record is None
        of = None if record is None else record.get("iteration")
        if isinstance(of, int) and of > iteration:
            repeated.add(of)
        else:
            kept.append(line + b"\n")
    write_whole(path, b"".join(kept))
    return Dropped(len(repeated), unreadable)


class TensorBoardFile:
    """One start's event file in a TensorBoard folder. Curves of earlier starts end before `first_step`.

    As torch's `SummaryWriter` writes it, but in this thread: a write that fails is known at once, adds
    nothing and can be tried again.

    Raises:
        OSError: it cannot be opened; by `write`, such a failure.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = AppendedFile(folder / name)
        self._events = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, point: Point) -> None:
        step, scalars = point
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _write(self, **event: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **event).SerializeToString())


class Sink(Generic[T]):
    """Passes records on in their order. Those that cannot be written stay here and go with the next one.

    `write` takes a record whole or fails with an `OSError`; `tell` hears in a line that it began to fail, and
    how that ended. Training goes on meanwhile, as with a checkpoint that cannot be saved.
    """

    def __init__(self, name: str, write: Callable[[T], None], tell: Callable[[str], None]) -> None:
        self._name, self._write, self._tell = name, write, tell
        self._waiting: deque[T] = deque()
        self._failing = False

    def put(self, record: T) -> None:
        """Write the record, after those that wait."""
        self._waiting.append(record)
        self.flush()

    def flush(self) -> int:
        """Try again; returns how many records still wait."""
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                self._tell(
                    f"warning: {self._name} cannot be written: {error.strerror or error}; training goes on, "
                    "and what is missing is written as soon as there is room"
                )
            self._failing = True
        else:
            if self._failing:
                self._tell(f"{self._name} is written again, with what was missing")
            self._failing = False
        return len(self._waiting)

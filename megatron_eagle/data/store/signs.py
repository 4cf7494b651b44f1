"""Whether a store that is being made is still being worked on: a file that is written again and again.

Readers compare what it holds with what it held, by their own clock: neither locks nor equal clocks are
needed, which a network's file systems and nodes do not always have.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from megatron_eagle.files import parse_line, write_whole

_SECONDS = 5.0


def growing_folder(path: str | Path) -> Path:
    """Where the store `path` grows until it is complete."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.partial")


def journal_folder(path: str | Path) -> Path:
    """What is known of the work on the store `path`; gone when it is complete."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.journal")


def _file(path: str | Path) -> Path:
    return journal_folder(path) / "alive.json"


class SignOfLife:
    """Tells readers of the store `path`, while it is entered, that work goes on; after an error, why not."""

    def __init__(self, path: Path, seconds: float = _SECONDS):
        self._file, self._seconds = _file(path), seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sign of life", daemon=True)

    def __enter__(self) -> Self:
        self._write("")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is not None:
            self._write(str(error) or kind.__name__)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._write("")

    def _write(self, ended: str) -> None:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "written": time.time(), "ended": ended}
        with suppress(OSError):  # a full disk ends the work elsewhere, in a line of its own
            write_whole(self._file, json.dumps(who), durable=False)


class Watch:
    """A reader's view of the work on the store `path`."""

    def __init__(self, path: str | Path):
        self._file = _file(path)
        self._last: dict[str, Any] | None = None
        self._since = time.monotonic()

    def look(self) -> float:
        """Seconds since something last changed; 0 while work goes on."""
        found = None
        with suppress(OSError):
            found = parse_line(self._file.read_bytes())
        if found is not None and found != self._last and not found.get("ended"):
            self._since = time.monotonic()
        self._last = found or self._last
        return time.monotonic() - self._since

    @property
    def words(self) -> str:
        """Who works on it, or worked, as far as is known."""
        if self._last is None:
            return "no preprocessing has been seen"
        who = f"preprocessing (process {self._last.get('pid')} on {self._last.get('host')})"
        return f"{who} ended: {self._last['ended']}" if self._last.get("ended") else who

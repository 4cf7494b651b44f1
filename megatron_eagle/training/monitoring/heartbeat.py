"""Is every rank alive, and who keeps the others waiting? One small file per rank, written by a thread.

    LOGS/heartbeat/rank_00003.json   {"rank", "host", "pid", "iteration", "phase", "since", "written", ...}
    LOGS/heartbeat/rank_00003.stack  where each thread of the rank stood when it was found hanging
    LOGS/hang.txt                    a line for each hang: which ranks stand where, and who is behind

The training thread only leaves a note in memory; the thread writes it every few seconds, also while the
training thread waits in a collective. A rank whose process is gone or stopped is known by a file that ages.
It begins before the ranks meet, which is where a restarted job would wait for one that does not come.
"""

import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, read_records, write_whole
from megatron_eagle.training.monitoring.observer import Observer

HEARTBEATS, REPORT = "heartbeat", "hang.txt"
# Of a job that ended itself because it hung (EX_SOFTWARE of sysexits.h).
EXIT_HANG = 70
# The order of a step's phases: who is in an earlier one keeps the others waiting.
_REACH_SECONDS = 5.0  # for a connection
STARTING, WAITING = "starting", "waiting for data"
PHASES = (STARTING, WAITING, "data", "forward and backward", "optimizer", "evaluation", "save", "ended")


@dataclass(frozen=True)
class Beat:
    """Where a rank stands; times in seconds since 1970, by its node's clock."""

    rank: int
    host: str
    pid: int
    iteration: int
    phase: str
    since: float  # of this phase
    written: float
    interval: float = 10.0  # seconds to the next one
    reaches: bool = True  # the place where the ranks met, as far as it has been asked for
    # Seconds since it was written, by the file system's time; of who reads it.
    age: float = field(default=0.0, compare=False)

    @property
    def standing(self) -> float:
        """Seconds in this phase."""
        return self.written - self.since + self.age

    @property
    def silent(self) -> bool:
        """Whether the process is gone, stopped, or its host without the file system."""
        return self.phase != "ended" and self.age > 3 * self.interval + 5

    @property
    def place(self) -> tuple[int, int]:
        return self.iteration, PHASES.index(self.phase)


class Heartbeat(Observer):
    """Writes this rank's file while it is entered; `phase` says where the training thread stands.

    After `hang_seconds` without a new phase the first rank that is still alive writes the report and prints
    it to stderr, and each rank its stacks; with `abort` all end then, with status 70. With `write=False`, as
    where the folder may be another run's yet, there are no files, and each rank names itself.
    """

    def __init__(
        self, logs: Path, rank: int, *, seconds: float, hang_seconds: float, abort: bool, write: bool = True
    ) -> None:
        self._folder, self._logs, self._rank = logs / HEARTBEATS, logs, rank
        self._seconds = min(seconds, hang_seconds / 4)
        self._hang_seconds, self._abort, self._writes = hang_seconds, abort, write
        self._note = (0, STARTING, time.time())
        self._reported: float | None = None
        self._reaches = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Begin to write.

        Raises:
            UserError: the folder cannot be written.
        """
        if not self._seconds:
            return self
        try:
            if self._writes:
                self._make_folder()
        except OSError as error:
            raise UserError(f"{self._folder}: cannot write heartbeats here: {error.strerror}") from error
        self._thread.start()
        return self

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            now = _now(self._folder)
            for file in self._folder.glob("rank_*.json"):
                if now - file.stat().st_mtime > 60:  # of an earlier, perhaps larger job
                    file.unlink()

    def __exit__(self, *exception: object) -> None:
        if self._seconds:
            self.phase(self._note[0], "ended")
            self._stop.set()
            self._thread.join()
            self._write()

    def phase(self, iteration: int, name: str) -> None:
        """The training thread begins this phase of this iteration (1-based)."""
        self._note = (iteration, name, time.time())

    def _run(self) -> None:
        self._write()
        while not self._stop.wait(self._seconds):
            self._write()
            since = self._note[2]
            if time.time() - since > self._hang_seconds and self._reported != since:
                self._reported = since
                self._report()

    def _write(self) -> None:
        if not self._writes:
            return
        beat = self._beat()
        target = self._folder / f"rank_{self._rank:05d}.json"
        with suppress(OSError):  # a full disk must not end the run; the file ages, as the report will say
            write_whole(target, json.dumps(asdict(beat)), durable=False)

    def _beat(self) -> Beat:
        who = self._rank, socket.gethostname(), os.getpid()
        return Beat(*who, *self._note, time.time(), self._seconds, self._reaches)

    def _report(self) -> None:
        if self._writes:
            with suppress(OSError), open(self._folder / f"rank_{self._rank:05d}.stack", "a") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self._reaches = _reaches_the_others()
        self._write()
        if self._stop.wait(2 * self._seconds):  # until every rank that lives has written where it stands
            return  # the run went on, and has ended
        with suppress(OSError, UserError):  # a disk that is full since the start has no heartbeats
            self._name_who_is_behind()
        if self._abort and not self._stop.wait(self._seconds):
            os._exit(EXIT_HANG)

    def _name_who_is_behind(self) -> None:
        if not self._writes:
            print(f"hang: {describe_beats([self._beat()])}", file=sys.stderr, flush=True)
            return
        beats = read_beats(self._logs)
        alive = [beat.rank for beat in beats if not beat.silent]
        if alive and alive[0] == self._rank:
            text = describe_beats(beats)
            print(f"hang: {text}", file=sys.stderr, flush=True)
            report = self._logs / REPORT
            earlier = report.read_text() if report.exists() else ""
            write_whole(report, f"{earlier}{text}\n")


def read_beats(logs: str | Path) -> list[Beat]:
    """The ranks' files, in rank order.

    Raises:
        UserError: there are none.
    """
    files = sorted((Path(logs) / HEARTBEATS).glob("rank_*.json"))
    now = _now(Path(logs) / HEARTBEATS)
    beats = [
        replace(from_record(Beat, record), age=max(0.0, now - file.stat().st_mtime))
        for file in files
        for record in read_records(file)
    ]
    if not beats:
        raise UserError(f"{logs}: no heartbeat of a run here; name a run's folder of logs")
    return beats


def status(logs: str | Path) -> str:
    """One line a rank, then who is behind.

    Raises:
        UserError: as `read_beats`.
    """
    beats = read_beats(logs)
    lines = [
        f"rank {beat.rank:>5}  {beat.host}  iteration {beat.iteration}, {beat.phase}, for "
        f"{beat.standing:.0f} s; written {beat.age:.0f} s ago"
        for beat in beats
    ]
    return "\n".join([*lines, describe_beats(beats)])


def describe_beats(beats: list[Beat]) -> str:
    """Who keeps the others waiting, in one line: the silent ranks, else those of a host that is cut off, else
    those behind, else all."""
    silent = [beat for beat in beats if beat.silent]
    cut = _cut_off(beats)
    first = min(beats, key=lambda beat: beat.place)
    last = max(beats, key=lambda beat: beat.place)
    if silent:
        kind, named = "silent (process gone or stopped)", silent
    elif cut:
        kind, named = cut
    elif first.place != last.place:
        kind, named = "behind the others", [beat for beat in beats if beat.place == first.place]
    else:
        kind, named = "all in the same phase, in a collective or in its computation", beats
    shown = ", ".join(
        f"rank {beat.rank} on {beat.host} (pid {beat.pid}) in iteration {beat.iteration}, {beat.phase}, "
        f"for {beat.standing:.0f} s"
        for beat in named[:8]
    )
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    where = f"; the furthest is rank {last.rank} in iteration {last.iteration}, {last.phase}"
    return f"{kind}: {shown}{more}{'' if named is beats else where}"


def _cut_off(beats: list[Beat]) -> tuple[str, list[Beat]] | None:
    """What is said of a host that is cut off, and its ranks. Rank 0's is where they met: it is that one where
    none of the others reaches it."""
    hosts = {beat.host for beat in beats}
    lost = {beat.host for beat in beats if not beat.reaches}
    if not lost:
        return None
    home = beats[0].host
    if len(hosts) == 2:
        words = f"hosts {home} and {lost.pop()} do not reach each other"
        return words, [beat for beat in beats if not beat.reaches]
    host = home if lost == hosts - {home} else min(lost)
    return f"host {host} is cut off from the others", [beat for beat in beats if beat.host == host]


def _reaches_the_others() -> bool:
    """Whether this host has a connection to the place where the ranks met; True where that is not known."""
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if None in place or "RANK" not in os.environ:
        return True
    try:
        socket.create_connection((place[0], int(place[1] or 0)), timeout=_REACH_SECONDS).close()
    except ConnectionRefusedError:  # by the host: it is the process that is gone
        return True
    except OSError:
        return False
    return True


def _now(folder: Path) -> float:
    """Seconds since 1970 by the file system's time, or by this host's where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()

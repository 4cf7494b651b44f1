"""Whose run folder this is: one job's at a time.

    RUN/owner.json   who writes here: job, host, process, since when; rank 0 touches it every few seconds
    RUN/.owner.lock  while one looks whether the folder is free and takes it; for a moment

Whether an owner lives is judged by one clock, that of the file system (the file's time, against that of a
file made now): nodes' clocks may differ. Locks of the system are not used; file systems of a network do not
always have them.
"""

import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, parse_line, write_whole

OWNER, _LOCK = "owner.json", ".owner.lock"
# Of a run that has lost its folder: started again it would be refused, by a UserError with this status.
EXIT_NOT_OWNER = 2
_BEAT_SECONDS, _MISSED_BEATS = 10.0, 3
_LOCK_SECONDS = 30.0  # a lock that is older was left by a process that was killed at this very moment


@dataclass(frozen=True)
class Owner:
    """A start of a run, as its file has it."""

    token: str  # of this start alone
    host: str
    pid: int
    since: float  # seconds since 1970, on the host
    machine: str  # of this start of the system, with its process numbers
    process: str  # when the process began, by the system's count
    job: str  # Slurm's cluster and job; empty: none
    requeues: int  # of the job before this start
    step: str  # of the job
    restarts: int  # by torchrun before this start
    beat: float = _BEAT_SECONDS  # seconds between two signs of life

    @classmethod
    def here(cls, environment: Mapping[str, str], beat: float) -> "Owner":
        """This process, with what Slurm and torchrun have told it."""
        job = environment.get("SLURM_JOB_ID", "")
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
            machine=_machine(),
            process=_process(os.getpid()) or "",
            job=job and f"{environment.get('SLURM_CLUSTER_NAME', '')}/{job}",
            requeues=int(environment.get("SLURM_RESTART_COUNT", 0)),
            step=environment.get("SLURM_STEP_ID", ""),
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
            beat=beat,
        )

    def follows(self, other: "Owner") -> bool:
        """Whether Slurm or torchrun has ended the other to start this one in its place."""
        if not self.job or self.job != other.job:
            return False
        within = self.requeues == other.requeues and self.step == other.step != ""
        return self.requeues > other.requeues or (within and self.restarts > other.restarts)

    @property
    def lives(self) -> bool | None:
        """Whether its process runs; None: it is no process of this machine."""
        if not self.machine or self.machine != _machine():
            return None
        return _process(self.pid) == self.process

    def __str__(self) -> str:
        job = f"job {self.job.rpartition('/')[2]}, " if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"{job}process {self.pid} on {self.host}, since {since}"


class _Seen(NamedTuple):
    """The file, as it was at some moment."""

    owner: Owner
    written: int  # ns, by the file system's time


class Ownership:
    """Owns a run folder while it is entered. Rank 0's alone; the others pass by with `active=False`.

    Where the folder is found with another owner later on, which took this one for dead, the process ends at
    once: two runs must not write into each other's checkpoints.
    """

    def __init__(self, folder: str | Path, *, active: bool = True, beat: float = _BEAT_SECONDS) -> None:
        """`beat`: seconds between two signs of life."""
        self._folder, self._active, self._beat = Path(folder), active, beat
        self._file = self._folder / OWNER
        self._me: Owner | None = None
        self._made: list[Path] = []  # folders that were not there before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="owner", daemon=True)

    def __enter__(self) -> Self:
        """Take the folder, perhaps after a look at its owner for some heartbeats.

        Raises:
            UserError: it is another's, who lives, or it cannot be written.
        """
        if self._active:
            try:
                self._made = [f for f in (self._folder, *self._folder.parents) if not f.exists()]
                self._folder.mkdir(parents=True, exist_ok=True)
                self._me = self._take(Owner.here(os.environ, self._beat))
            except OSError as error:
                raise UserError(
                    f"{self._folder}: cannot write here whose run it is: {error.strerror}"
                ) from error
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._me is None:
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            found = _look(self._file)
            if found is not None and found.owner.token == self._me.token:
                self._file.unlink()
            for folder in self._made:  # where nothing came of the run, nothing is left
                folder.rmdir()

    def check(self) -> None:
        """End this process where the folder has another owner. A folder that cannot be read says nothing."""
        if self._me is None:
            return
        with suppress(OSError):
            found = _look(self._file)
            if found is not None and found.owner.token != self._me.token:
                print(
                    f"error: {self._folder}: this run ({self._me}) gave no sign of life for a while and "
                    f"has lost its folder to another ({found.owner}): it ends without a save",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_NOT_OWNER)

    def _run(self) -> None:
        while not self._stop.wait(self._beat):
            self.check()
            with suppress(OSError):
                os.utime(self._file)

    def _take(self, me: Owner) -> Owner:
        stale: _Seen | None = None
        while True:
            with _lock(self._folder):
                found = _look(self._file)
                why = None if found is None else self._why_free(found, me, stale)
                if found is None or why is not None:
                    write_whole(self._file, json.dumps(asdict(me)))
                    break
            stale = self._watch(found)
        if found is not None:
            print(f"{self._folder}: taken over from {found.owner}: {why}", file=sys.stderr, flush=True)
        return me

    @staticmethod
    def _why_free(found: _Seen, me: Owner, stale: _Seen | None) -> str | None:
        if me.follows(found.owner):
            return "the same job, started again"
        if found.owner.lives is False:
            return "its process is gone"
        return "it gives no sign of life" if found == stale else None

    def _watch(self, found: _Seen) -> _Seen | None:
        """Look at an owner until it counts as dead. None: its process or its file is gone meanwhile.

        Raises:
            UserError: it lives.
        """
        owner, began = found.owner, time.monotonic()
        while not owner.lives:
            again = _look(self._file)
            if again is None:
                return None
            if again != found:
                owner = again.owner
                break
            silent = (_now(self._folder) - found.written) / 1e9
            watched = (time.monotonic() - began) / owner.beat
            # The second: on file systems that take the time from the node that writes, two clocks may differ.
            if watched > _MISSED_BEATS or (silent > _MISSED_BEATS * owner.beat and watched > 1.5):
                return found
            if owner.lives is False:
                return None
            time.sleep(owner.beat / 10)
        raise UserError(
            f"{self._folder}: another run writes here ({owner}): wait for it, stop it, or name another "
            "checkpoint.path"
        )


def is_free(folder: str | Path) -> bool:
    """Whether nobody else may be writing into a run folder. Nothing is taken; on every rank."""
    try:
        found = _look(Path(folder, OWNER))
    except OSError:
        return True
    if found is None or found.owner.lives is False:
        return True
    return Owner.here(os.environ, _BEAT_SECONDS).follows(found.owner)


def describe_owner(folder: str | Path) -> str | None:
    """Whose run folder it is and whether its owner lives, in one line; None: nobody's.

    Raises:
        UserError: the folder or its file cannot be read.
    """
    try:
        found = _look(Path(folder, OWNER))
    except OSError as error:
        raise UserError(f"{folder}: cannot read whose run it is: {error.strerror}") from error
    if found is None:
        return None
    owner = found.owner
    try:
        now = _now(Path(folder))
    except OSError:  # a guest, who may not write here
        now = time.time_ns()
    silent = max(0.0, (now - found.written) / 1e9)
    if owner.lives is False:
        state = "stale: its process is gone"
    elif owner.lives or silent <= _MISSED_BEATS * owner.beat:
        state = f"alive: last sign of life {silent:.0f} s ago"
    else:
        state = f"stale: no sign of life for {silent:.0f} s"
    return f"{owner}; {state}"


def _look(file: Path) -> _Seen | None:
    """What the file says now; None: there is none, or none that this version understands.

    Opened and not only asked for: file systems of a network look at the server then.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            record, written = parse_line(opened.read()), os.fstat(opened.fileno()).st_mtime_ns
        return None if record is None else _Seen(from_record(Owner, record), written)
    except (FileNotFoundError, TypeError):
        return None


def _now(folder: Path) -> int:
    """ns, by the time of the folder's file system."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time. Held for a moment only: one that stays the same is removed."""
    file, seen, since = folder / _LOCK, None, time.monotonic()
    while True:
        try:
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            with suppress(FileNotFoundError):
                now = file.stat().st_mtime_ns
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > _LOCK_SECONDS:
                    file.unlink()
            time.sleep(0.02)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _machine() -> str:
    """This start of this machine and its space of process numbers, of which containers have their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> str | None:
    """When the process began, in ticks since the machine's start; None: it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]

"""How each fault is done to a job. What a block leaves behind is whole again when it ends."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import psutil

from tests.cluster.slurm import Slurm
from tests.cluster.soak.schedule import Fault

BRIEF_SECONDS = 3.0  # what nobody has to notice
UNDER_WAY_SECONDS = 0.7  # a step that had what it needed from others ends, and is logged
ROOM = 20_000  # bytes that are left of a full disk: too few for a checkpoint


class Victim(Protocol):
    """The job, as faults see it."""

    slurm: Slurm
    job: int

    def iteration(self) -> int:
        """The last one that is logged."""

    def wait(self, true: Callable[[], bool], what: str) -> None:
        """Return when it is true, with an eye on the job."""

    def said(self) -> str:
        """What the job has printed."""

    def requeues(self) -> int:
        """How often Slurm has put the job into the queue again."""


@dataclass(frozen=True)
class Effect:
    """What the run must tell of a fault: events of these kinds. None: it must not notice.

    Attributes:
        requeued: the job has to go through the queue, where it may otherwise.
        processes: of the start that follows, if that is known.
        passed: iterations that were logged while a fault for a moment lasted.
    """

    events: tuple[str, ...] = ()
    requeued: bool = False
    processes: int | None = None
    passed: int | None = None


Doing = AbstractContextManager[tuple[str, Effect]]  # gives who it is done to, and what must be told


@contextmanager
def rank(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    """As by the kernel that needs memory."""
    host, process = _choose(_find(run, ranks=True), fault.place)
    os.kill(process.pid, signal.SIGKILL)
    yield host, Effect(("resumed",))


@contextmanager
def torchrun(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    host, process = _choose(_find(run, ranks=False), fault.place)
    os.kill(process.pid, signal.SIGKILL)
    yield host, Effect(("resumed",))


@contextmanager
def slurmd(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    host = _host(run, fault)
    log = run.slurm.folder / f"{host}.log"
    started = log.read_text().count("slurmd started")
    with ExitStack() as after:
        run.slurm.kill_daemon(host)
        after.callback(run.slurm.start_node, host)
        effect = _while_it_lasts(run, fault, f"slurmd on {host} is dead")
        if fault.brief:
            after.close()
            run.wait(lambda: log.read_text().count("slurmd started") > started, f"slurmd on {host} starts")
        yield host, effect


@contextmanager
def node(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    host = _host(run, fault)
    run.slurm.kill_node(host)
    try:
        yield host, Effect(("resumed",))
    finally:
        run.slurm.start_node(host)


@contextmanager
def link(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    host = _host(run, fault)
    with ExitStack() as after:
        after.enter_context(run.slurm.cut(host))
        effect = _while_it_lasts(run, fault, f"{host} has no link")
        if fault.brief:
            after.close()
        yield host, effect


@contextmanager
def disk(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    ballast, before = run.slurm.disk / "ballast", run.said().count(": failed_save: ")
    try:
        with ballast.open("wb") as file:
            # A checkpoint under way may take, or leave, some of it meanwhile, and before the next line, too.
            while run.said().count(": failed_save: ") == before:
                free = shutil.disk_usage(run.slurm.disk).free - ROOM
                with suppress(OSError):
                    if free > 0:
                        os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)
                run.wait(lambda: True, "a save fails on a full disk")
                time.sleep(0.05)
    finally:
        ballast.unlink(missing_ok=True)
    yield "the run's disk", Effect(("failed_save",))


@contextmanager
def preempt(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:  # noqa: ARG001  # as the others
    words = ("--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1")
    run.slurm.call("sbatch", f"--output={run.slurm.folder}/urgent.out", *words)
    yield "the job", Effect(("preempted", "resumed"), requeued=True)


@contextmanager
def requeue(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:  # noqa: ARG001
    run.slurm.call("scontrol", "requeue", str(run.job))
    yield "the job", Effect(("resumed",), requeued=True)


@contextmanager
def fewer_nodes(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:
    # Where it has failed before the job does not go again.
    left_out = run.slurm.job(run.job).get("ExcNodeList", "(null)").strip("()")
    excluded = run.slurm.call("scontrol", "show", "hostnames", left_out).stdout.split()
    usable = [name for name in run.slurm.names if name not in excluded]
    kept = usable[fault.place % len(usable)]
    drained = ",".join(name for name in run.slurm.names if name != kept)
    run.slurm.call("scontrol", "update", f"NodeName={drained}", "State=DRAIN", "Reason=soak")
    run.slurm.call("scontrol", "requeue", str(run.job))
    yield kept, Effect(("resumed",), requeued=True, processes=1)


@contextmanager
def more_nodes(run: Victim, fault: Fault) -> Iterator[tuple[str, Effect]]:  # noqa: ARG001
    for name in run.slurm.names:
        run.slurm.call("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
    run.slurm.call("scontrol", "requeue", str(run.job))
    yield "the job", Effect(("resumed",), requeued=True, processes=2)


DOING: dict[str, Callable[[Victim, Fault], Doing]] = {
    "rank": rank,
    "torchrun": torchrun,
    "slurmd": slurmd,
    "node": node,
    "link": link,
    "disk": disk,
    "preempt": preempt,
    "requeue": requeue,
    "fewer nodes": fewer_nodes,
    "more nodes": more_nodes,
}


def _while_it_lasts(run: Victim, fault: Fault, what: str) -> Effect:
    """Wait: for a moment, or until Slurm has given the job to other nodes."""
    if fault.brief:
        time.sleep(UNDER_WAY_SECONDS)
        before = run.iteration()
        time.sleep(BRIEF_SECONDS - UNDER_WAY_SECONDS)
        return Effect(passed=run.iteration() - before)
    before = run.requeues()
    run.wait(lambda: run.requeues() > before, what)
    return Effect(("resumed",), requeued=True)


def _hosts(run: Victim) -> list[str]:
    nodes = run.slurm.job(run.job)["NodeList"]
    return run.slurm.call("scontrol", "show", "hostnames", nodes).stdout.split()


def _host(run: Victim, fault: Fault) -> str:
    hosts = _hosts(run)
    return hosts[fault.place % len(hosts)]


def _find(run: Victim, *, ranks: bool) -> list[tuple[str, psutil.Process]]:
    """The job's ranks, or its torchruns, with their hosts."""
    found = []
    for host in _hosts(run):
        for process in run.slurm.processes(host):
            words = process.info["cmdline"] or [""]
            launcher = "megatron_eagle.runtime.torchrun" in words
            if "tools/train.py" in words and "python" in words[0] and launcher != ranks:
                found.append((host, process))
    if not ranks:
        return found
    launchers = {process.pid for _, process in _find(run, ranks=False)}
    return [(host, process) for host, process in found if process.info["ppid"] in launchers]


def _choose(found: list[tuple[str, psutil.Process]], place: int) -> tuple[str, psutil.Process]:
    return found[place % len(found)]

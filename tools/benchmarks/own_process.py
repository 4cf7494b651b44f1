"""Time and memory of a function in a process of its own; the time of processes that it starts counts too."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Used:
    """What a function took.

    Attributes:
        peak: the most memory of its process in MB, pages of files that it has mapped and read included, which
            the kernel takes back when it wants them.
        anonymous: the most that is its own, looked at 50 times a second.
    """

    wall: float
    cpu: float
    peak: float
    anonymous: float


def in_own_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Used]:
    """What a function returns, and what it took.

    Raises:
        RuntimeError: its process died.
    """
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, arguments))
    process.start()
    sender.close()
    anonymous = 0.0
    while not answer.poll(0.02):
        anonymous = max(anonymous, _megabytes("RssAnon", str(process.pid)))
    try:
        result, wall, cpu, peak = answer.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} ended its process") from None
    finally:
        process.join()
    return result, Used(wall, cpu, peak, anonymous)


def _work(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far is forgotten
    wall, cpu = time.perf_counter(), _cpu_seconds()
    result = function(*arguments)
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    sender.send((result, wall, cpu, _megabytes("VmHWM", "self")))


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _megabytes(name: str, process: str) -> float:
    try:
        lines = Path("/proc", process, "status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{name}:")), 0.0)

"""torchrun for the jobs of a cluster: `python -m megatron_eagle.runtime.torchrun [torchrun's arguments]`.

Told to stop, it ends with a line where torchrun shows a traceback on every node; the training processes have
had its time to save. Signals after the first are ignored (torchrun's handler is patched): Slurm sends them to
torchrun and to the processes, and a second one would end torchrun's wait for them. One that comes while its
processes have ended, and it waits for those of other nodes, ends it at once. Each restart meets in a
store of its own: those in torchrun's one find the addresses of the processes before. `%h` in `--log-dir
LOGS/%h` stands for this host's name.

With `--log-dir` and `--rdzv-id ID` it leaves the file `ended-ID` in the former, for a script that looks for
the node that has failed: one line, `KIND NODE WORDS`. KIND:

    killed      a process was ended from outside, or by a fault of its own: the first to look at
    error       ... by an error of its own
    hang        the processes have ended themselves because the run stood still
    lost        a process has lost the others, and this host the rest of the run: another one is to blame
    told        it was told to end
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun

from megatron_eagle.errors import run_cli
from megatron_eagle.files import write_whole

# Status of processes that were stopped and have saved (training/resilience/policy.py), and of a run that hung
# (training/monitoring/heartbeat.py).
_STOPPED, _HUNG = 75, 70
# While which a host that has only lost the others lets them say why: srun kills all when the first ends.
_OTHERS_FIRST_SECONDS = 5.0
_LOST = re.compile(r"Dist\w+Error|gloo|NCCL|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)

HowEnded = Literal["killed", "error", "hang", "lost", "told"]
_WORST_FIRST: tuple[HowEnded, ...] = ("killed", "error", "hang", "lost", "told")
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns its exit status."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    host, words = socket.gethostname(), list(sys.argv[1:] if argv is None else argv)
    if "--log-dir" in words[:-1]:
        folder = words.index("--log-dir") + 1
        words[folder] = words[folder].replace("%h", host)
    api._terminate_process_handler = _end_once  # which torchrun installs whenever it starts processes
    SimpleElasticAgent._exit_barrier = _wait_for_others  # type: ignore[method-assign]
    kind: HowEnded
    try:
        torchrun(words)
    except SignalException as stopped:
        status, kind, why = _STOPPED, "told", f"ended after {signal.Signals(stopped.sigval).name}"
    except ChildFailedError as failed:
        rank, first = min(failed.failures.items(), key=_worst_first)
        how = first.signal_name() if first.exitcode < 0 else f"status {first.exitcode}"
        if said := _said(first):
            how += f" ({' '.join(said.split())[:200]})"
        status, kind = _STOPPED if first.exitcode == _STOPPED else 1, kind_of(first)
        why = f"ended: rank {rank} was the first to end early, by {how}"
    except json.JSONDecodeError:  # torch reads why a process has failed in a file that a full disk cuts off
        status, kind, why = 1, "error", "ended: a process has failed, and could not write why (a full disk?)"
    except RendezvousError as error:
        why = f"ended: it did not meet the other nodes ({str(error) or type(error).__name__})"
        status, kind = 1, "lost"
    else:
        return 0
    print(f"torchrun on {host} {why}", file=sys.stderr, flush=True)
    _note(words, kind, f"{os.environ.get('SLURMD_NODENAME', host)} {why.removeprefix('ended: ')}")
    if kind == "lost":
        time.sleep(_OTHERS_FIRST_SECONDS)
    return status


def kind_of(failure: ProcessFailure) -> HowEnded:
    """Of the end of a process."""
    code = failure.exitcode
    if code in (_STOPPED, -signal.SIGTERM):
        return "told"
    if code == _HUNG:
        return "hang"
    if code == -signal.SIGABRT or _LOST.search(_said(failure)):  # NCCL's watchdog aborts
        return "lost"
    return "killed" if code < 0 or code > 128 else "error"


def _said(failure: ProcessFailure) -> str:
    """By what exception the process has ended; empty: it could not say it."""
    message = failure.error_file_data.get("message")
    return str(message.get("message", "")) if isinstance(message, dict) else ""


def _worst_first(failure: tuple[int, ProcessFailure]) -> tuple[int, int]:
    return _WORST_FIRST.index(kind_of(failure[1])), failure[1].timestamp


def _note(words: Sequence[str], kind: HowEnded, text: str) -> None:
    said = dict(zip(words, words[1:], strict=False))
    if "--log-dir" in said and "--rdzv-id" in said:
        file = Path(said["--log-dir"], f"ended-{said['--rdzv-id']}")
        with suppress(OSError):  # a full disk
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, f"{kind} {text}\n", durable=False)


def _end_once(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  # as torchrun calls it
    for other in _ENDING:
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(signum)
    raise SignalException(f"told to end by {name.name}", sigval=name)


def _wait_for_others(
    agent: SimpleElasticAgent,
    wait: Callable[[SimpleElasticAgent], None] = SimpleElasticAgent._exit_barrier,
) -> None:
    with _signals_end_it():
        wait(agent)


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """At once, by a thread: Python's own handlers come after the wait in the store, up to five minutes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        for number in iter(lambda: os.read(reader, 1), b""):
            if number[0] in _ENDING:
                name = signal.Signals(number[0]).name
                print(f"torchrun on {socket.gethostname()} ended after {name}", file=sys.stderr, flush=True)
                os._exit(_STOPPED)

    listening = threading.Thread(target=listen, name="signals", daemon=True)
    listening.start()
    before = signal.set_wakeup_fd(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        listening.join()
        os.close(reader)


if __name__ == "__main__":
    run_cli(main)

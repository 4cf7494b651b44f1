"""torchrun for the jobs of a cluster: `python -m megatron_eagle.runtime.torchrun [torchrun's arguments]`.

Told to stop, it ends with a line where torchrun shows a traceback on every node; the training processes have
had its time to save. Signals after the first are ignored (torchrun's handler is patched): Slurm sends them to
torchrun and to the processes, and a second one would end torchrun's wait for them. One that comes while its
processes have ended, and it waits for those of other nodes, ends it at once. Each restart meets in a
store of its own: those in torchrun's one find the addresses of the processes before. `%h` in `--log-dir
LOGS/%h` stands for this host's name.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun

from megatron_eagle.errors import run_cli

# Processes that were stopped and have saved end with it (training/resilience/policy.py).
_STOPPED = 75
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
    try:
        torchrun(words)
    except SignalException as stopped:
        print(f"torchrun on {host} ended after {signal.Signals(stopped.sigval).name}", file=sys.stderr)
        return _STOPPED
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        how = first.signal_name() if first.exitcode < 0 else f"status {first.exitcode}"
        print(f"torchrun on {host} ended: rank {rank} was the first to end early, by {how}", file=sys.stderr)
        return _STOPPED if first.exitcode == _STOPPED else 1
    except RendezvousError as error:
        why = str(error) or type(error).__name__
        print(f"torchrun on {host} ended: it did not meet the other nodes ({why})", file=sys.stderr)
        return 1
    return 0


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

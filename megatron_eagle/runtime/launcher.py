"""A training process without the torchrun that started it ends.

torchrun gives it a session of its own, in which it would go on after the launcher was killed."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

# Of a process whose launcher has gone (EX_UNAVAILABLE of sysexits.h).
EXIT_ALONE = 69
_SECONDS = 1.0


@contextlib.contextmanager
def end_with_launcher() -> Iterator[None]:
    """While the block runs, end this process, without a save, when the torchrun that started it is gone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # another parent may well go: a shell that was closed
        yield
        return
    parent, stop = os.getppid(), threading.Event()

    def watch() -> None:
        while not stop.wait(_SECONDS):
            if os.getppid() != parent:
                rank = os.environ.get("RANK", "?")
                print(f"error: rank {rank}: torchrun (process {parent}) is gone", file=sys.stderr, flush=True)
                os._exit(EXIT_ALONE)

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

"""A Python with a torchrun of before torch 2.12, for PYTHON of the examples.

Its help has neither `--signals-to-handle` nor `--shutdown-timeout`; it refuses both, dies of SIGUSR1, and
forwards SIGTERM, to kill 30 seconds later.

With STANDIN_TRAINER it needs no torch: that program runs in place of tools/train.py, under an agent that
starts failed processes again, and checks pass. Without, torch's own torchrun runs, which without the flags
does the same.
"""

import os
import signal
import subprocess
import sys
import time

NEW = ("--signals-to-handle", "--signals_to_handle", "--shutdown-timeout", "--shutdown_timeout")
TRAINER = os.environ.get("STANDIN_TRAINER")


def main(arguments: list[str]) -> int:
    """What Python does with these arguments."""
    if arguments[:2] not in (["-m", "torch.distributed.run"], ["-m", "megatron_eagle.runtime.torchrun"]):
        checks = arguments[:2] == ["tools/train.py", "check"] or "import megatron_eagle" in arguments[-1]
        if TRAINER and checks:
            return 0
        os.execv(sys.executable, [sys.executable, *arguments])
    if "--help" in arguments:
        print("usage: torchrun [--nnodes NNODES] [--nproc-per-node N] [--max-restarts N] training_script ...")
        return 0
    script = arguments.index("tools/train.py")
    if refused := [word for word in arguments[:script] if word.partition("=")[0] in NEW]:
        print(f"torchrun: error: unrecognized arguments: {' '.join(refused)}", file=sys.stderr)
        return 2
    if TRAINER is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    given = dict(zip(arguments[2:script:2], arguments[3:script:2], strict=True))
    command = [sys.executable, TRAINER, *arguments[script + 1 :]]
    return watch(command, int(given["--nproc-per-node"]), int(given["--max-restarts"]))


class Stopped(Exception):
    """A signal that is handled."""


def watch(command: list[str], processes: int, restarts: int) -> int:
    """torchrun's agent: 0 when all processes have ended with 0; all are started again when one fails."""

    def stop(number: int, _) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, stop)
    for _ in range(restarts + 1):
        running = [subprocess.Popen(command) for _ in range(processes)]
        try:
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running):
                    break
                time.sleep(0.02)
        except Stopped as stopped:
            end(running, stopped.args[0])
            return 1
        if not any(process.poll() for process in running) and None not in [p.poll() for p in running]:
            return 0
        end(running, signal.SIGTERM)
    return 1


def end(running: list[subprocess.Popen], number: int) -> None:
    """Pass the signal on, and kill after 30 seconds."""
    for process in running:
        process.send_signal(number)
    deadline = time.monotonic() + 30
    for process in running:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

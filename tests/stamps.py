"""What passed at this commit, so that `make test-all` may be run over several sittings.

python -m tests.stamps run TARGET COMMAND ...   runs a target's command; leaves a stamp if it passed
python -m tests.stamps all TARGET ...           `make` of every target that has no stamp for this commit

A stamp is build/stamps/COMMIT/TARGET and holds the minutes that it took. A tree with changes leaves none.
What a target took when it passed last, whatever the tree, is in build/records/TARGET.json,
for `make readme`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.paths import REPO

APART = "test-soak"  # not part of the sum: it is long on purpose


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="stamps", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("target")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    commands.add_parser("all").add_argument("targets", nargs="+", metavar="TARGET")
    options = parser.parse_args(arguments)
    if options.command == "run":
        return run_target(options.target, options.words)
    return run_all(options.targets)


def folder() -> Path | None:
    """Of this commit's stamps; None where the tree is not that of a commit."""
    try:
        changes, commit = (_git(*words) for words in (("status", "--porcelain"), ("rev-parse", "HEAD")))
    except (OSError, subprocess.CalledProcessError):
        return None
    return None if changes else REPO / "build" / "stamps" / commit


def run_target(target: str, words: list[str]) -> int:
    """Run a command, print its minutes, and stamp the target if it passed; returns its exit status."""
    before, start, used = folder(), time.monotonic(), cpu_seconds()
    status = subprocess.run(words, cwd=REPO, check=False).returncode
    seconds, used = time.monotonic() - start, cpu_seconds() - used
    minutes = seconds / 60
    said = f"{target}: {'passed' if status == 0 else 'failed'} after {minutes:.1f} minutes"
    print(said, flush=True)
    if status:
        return status
    record = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "load": os.getloadavg()[1],  # of the last five minutes: whether others worked here too
        "said": said,
    }
    (REPO / "build" / "records").mkdir(parents=True, exist_ok=True)
    (REPO / "build" / "records" / f"{target}.json").write_text(json.dumps(record) + "\n")
    if before is None or folder() != before:
        print(f"{target}: no stamp, the tree is not that of a commit")
        return 0
    before.mkdir(parents=True, exist_ok=True)
    (before / target).write_text(f"{minutes:.1f}\n")
    return 0


def run_all(targets: list[str]) -> int:
    """Make the targets that have no stamp, the later ones also after a failure; 1 if any failed."""
    done, failed = folder(), []
    for target in targets:
        if _stamped(done, target):
            print(f"{target}: passed at this commit before")
        elif subprocess.run(["make", "--no-print-directory", target], cwd=REPO, check=False).returncode:
            failed.append(target)
    minutes = {target: float((done / target).read_text()) for target in targets if _stamped(done, target)}
    for target in targets:
        took = f"{minutes[target]:6.1f} minutes" if target in minutes else "  no stamp"
        print(f"{target:<24}{'failed' if target in failed else took}")
    whole = sum(took for target, took in minutes.items() if target != APART)
    print(f"{'whole':<24}{whole:6.1f} minutes, {APART} apart")
    return 1 if failed else 0


def _stamped(done: Path | None, target: str) -> bool:
    return done is not None and (done / target).is_file()


def cpu_seconds() -> float:
    """Of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

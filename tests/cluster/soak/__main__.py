"""`make soak`: seeded faults on a real Slurm, and a card of those that were suffered."""

import argparse
import sys
from itertools import islice
from pathlib import Path

from megatron_eagle.errors import run_cli
from tests.cluster.slurm import missing
from tests.cluster.soak.running import soak
from tests.cluster.soak.schedule import schedule
from tests.paths import REPO

FOLDER = REPO / "build" / "soak"


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--faults", type=int)
    arguments = parser.parse_args()
    if reason := missing():
        print(f"no Slurm for the soak here: {reason}")
        return 1
    faults = islice(schedule(arguments.seed), arguments.faults)
    soak(arguments.folder, arguments.seed, faults, arguments.minutes, lambda text: print(text, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main) or 0)

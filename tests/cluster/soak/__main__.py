"""`make soak`: seeded faults on a real Slurm, a seed after the other over many runs, and a card of them all.

suffer   the next seed's run, for so many minutes
judge    what its logs say, beside a run without faults; status 1 where a fault was lost or anything is wrong
card     all judged seeds into examples/cards/soak.json
"""

import argparse
from itertools import islice
from pathlib import Path

from megatron_eagle.errors import run_cli
from tests.cluster.slurm import missing
from tests.cluster.soak import card
from tests.cluster.soak.judging import judge
from tests.cluster.soak.ledger import read_all, seed_folder
from tests.cluster.soak.running import soak
from tests.cluster.soak.schedule import schedule
from tests.paths import REPO

FOLDER = REPO / "build" / "soak"


def main() -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("suffer", "judge", "card"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the seeds' files (build/soak)")
    parser.add_argument("--seed", type=int, help="default: the first without files; judge: this one again")
    parser.add_argument("--minutes", type=float, default=30, help="after which no fault is added")
    parser.add_argument("--faults", type=int, help="no more than so many")
    options = parser.parse_args()
    if options.what == "suffer":
        return _suffer(options)
    if options.what == "judge":
        return _judge(options.folder, options.seed)
    made = card.card(read_all(options.folder))
    if not made["rows"]:
        return _nothing(options.folder)
    print(f"written to {card.write(made).relative_to(REPO)}")
    return 0


def _suffer(options: argparse.Namespace) -> int:
    if reason := missing():
        print(f"no Slurm for the soak here: {reason}")
        return 1
    seed = options.seed or 1
    while options.seed is None and seed_folder(options.folder, seed).exists():
        seed += 1
    faults = islice(schedule(seed), options.faults)
    soak(options.folder, seed, faults, options.minutes, lambda text: print(text, flush=True))
    return 0


def _judge(folder: Path, again: int | None) -> int:
    """All seeds that have an end and no verdict, and one of them again; then what all of them say."""
    for ledger in read_all(folder):
        if ledger.end is None:
            print(f"seed {ledger.head.seed} was cut off after {len(ledger.faults)} faults: not judged")
        elif ledger.verdict is None or ledger.head.seed == again:
            verdict = judge(ledger)
            print(f"seed {ledger.head.seed}: {'; '.join(verdict.problems) or 'nothing is wrong'}", flush=True)
    made = card.card(read_all(folder))
    if not made["rows"]:
        return _nothing(folder)
    print(card.table(made))
    return int(made["lost"] > 0 or made["seeds with problems"] > 0)


def _nothing(folder: Path) -> int:
    print(f"no seed in {folder} is judged: `suffer` comes first, then `judge`")
    return 1


if __name__ == "__main__":
    run_cli(main)

"""Which faults a run suffers, and in which order: the same for the same seed."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

KINDS = {
    "rank": "a rank is killed",
    "torchrun": "a node's torchrun is killed, its ranks are not",
    "slurmd": "a node's slurmd is killed: for a moment, or until Slurm takes the node for dead",
    "node": "all processes of a node are killed",
    "link": "a node's link is cut: for a moment, or until Slurm takes the node for dead",
    "disk": "the run's disk is full while it saves",
    "preempt": "a job of higher priority takes all nodes, with a grace time",
    "requeue": "the job is requeued",
    "fewer nodes": "all nodes but one are drained, the job is requeued",
    "more nodes": "they are there again, the job is requeued",
}
_MOST_STEPS = 8  # that a fault waits for


@dataclass(frozen=True)
class Fault:
    """A fault of the schedule."""

    number: int  # in the seed's schedule, from 1
    kind: str
    after: int  # iterations, counted from when the run has got over the fault before
    place: int  # of the job's nodes or ranks, by their number modulo how many there are
    brief: bool = False  # over before anyone has to notice


def schedule(seed: int) -> Iterator[Fault]:
    """Without end: in each round every kind once; the nodes come back after fewer were there.

    A round has slurmd and the link once for a moment or once for long, in turns.
    """
    random, number = Random(f"soak {seed}"), 0
    brief = {"slurmd": random.random() < 0.5, "link": random.random() < 0.5}
    while True:
        kinds = [kind for kind in KINDS if kind != "more nodes"]
        random.shuffle(kinds)
        kinds.insert(kinds.index("fewer nodes") + 1, "more nodes")
        for kind in kinds:
            number += 1
            after, place = random.randint(0, _MOST_STEPS), random.randrange(12)
            yield Fault(number, kind, after, place, brief.get(kind, False))
        brief = {kind: not was for kind, was in brief.items()}

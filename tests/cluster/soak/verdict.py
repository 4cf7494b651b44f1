"""Whether a run has got over its faults: order of its data, losses, what was lost, what was told."""

from collections.abc import Sequence
from typing import Any

from megatron_eagle.training.monitoring.metrics import StepMetrics
from tests.cluster.soak.ledger import Suffered

OTHER_LAYOUT = 1e-3  # relative, as tests/checkpoint/test_layouts.py
# What tells of each kind: events of the run, and words of Slurm's logs. A kind for a moment has its own name.
EVENTS = {
    "rank": ("resumed",),
    "torchrun": ("resumed",),
    "slurmd": ("resumed",),
    "node": ("resumed",),
    "link": ("resumed",),
    "disk": ("failed_save",),
    "preempt": ("preempted", "resumed"),
    "requeue": ("resumed",),
    "fewer nodes": ("resumed",),
    "more nodes": ("resumed",),
    "slurmd for a moment": (),
    "link for a moment": (),
}
HISTORY = {
    "slurmd": "not responding",
    "slurmd for a moment": "slurmd started",
    "node": "slurmd started",
    "link": "not responding",
    "preempt": "urgent",  # the partition whose job took the nodes
    "requeue": "Requeuing",
    "fewer nodes": "state set to DRAIN",
    "more nodes": "state set to IDLE",
}


def name_of(fault: Suffered) -> str:
    """Its kind, as tables have it."""
    return fault.kind + " for a moment" * fault.brief


def judge_order(steps: Sequence[StepMetrics], packs: int) -> list[str]:
    """What is wrong with the order of the data: every step once, and every pack once.

    Args:
        steps: of the run's log.
        packs: of a step.
    """
    problems = []
    if len({str(step.data) for step in steps}) > 1:
        problems.append("steps name different data")
    for number, step in enumerate(steps, 1):
        if step.iteration != number:
            problems.append(
                f"line {number} of the log is iteration {step.iteration}: one is lost or repeated"
            )
        elif (step.first_pack, step.packs) != ((number - 1) * packs, packs):
            problems.append(
                f"iteration {number} read {step.packs} packs from {step.first_pack}, "
                f"not {packs} from {(number - 1) * packs}"
            )
        else:
            continue
        break  # the rest follows from it
    return problems


def judge_losses(steps: Sequence[StepMetrics], same: Sequence[StepMetrics]) -> list[str]:
    """Steps that are not, bit by bit, those of an uninterrupted run that has the same layouts."""
    if len(steps) != len(same):
        return [f"{len(steps)} steps, and {len(same)} of the uninterrupted run"]
    for step, other in zip(steps, same, strict=True):
        found, wanted = (step.loss, step.grad_norm), (other.loss, other.grad_norm)
        if found != wanted:
            return [f"iteration {step.iteration}: loss and norm {found}, uninterrupted {wanted}"]
    return []


def largest_difference(steps: Sequence[StepMetrics], other: Sequence[StepMetrics]) -> float:
    """Of the losses, relative."""
    return max((abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(steps, other, strict=True)), default=0.0)


def judge_fault(fault: Suffered, events: Sequence[dict[str, Any]], interval: int) -> list[str]:
    """What is wrong with how a fault was survived.

    Args:
        events: of the run, as its log has them in the end.
        interval: iterations between checkpoints.
    """
    kind, problems = name_of(fault), []
    if not fault.recovered:
        problems.append(f"lost: {fault.why}")
    if fault.repeated > interval:
        problems.append(f"{fault.repeated} iterations repeated, more than the {interval} between checkpoints")
    kinds = [event["event"] for event in fault.events if event in events]
    problems += [f"no event {event} in the run's log" for event in EVENTS[kind] if event not in kinds]
    problems += [
        f"an event {event['event']} of iteration {event['iteration']} is not in the run's log any more"
        for event in fault.events
        if event not in events
    ]
    if kind in HISTORY and not any(HISTORY[kind] in line for line in fault.history):
        problems.append(f"Slurm's logs have no '{HISTORY[kind]}'")
    if kind == "link for a moment" and fault.passed != 0:
        problems.append(f"{fault.passed} iterations were trained without the link")
    if kind == "slurmd for a moment" and not fault.passed:
        problems.append("the run has waited for it")
    return [f"fault {fault.number}, {kind}: {problem}" for problem in problems]


def is_untouched(fault: Suffered, layouts: Sequence[tuple[int, int]]) -> bool:
    """Whether a run was on one node when a link was cut for a moment: nobody there waits for another.

    Args:
        layouts: pairs: after this iteration, so many processes, one a node.
    """
    processes = [count for start, count in layouts if start <= fault.iteration][-1]
    return name_of(fault) == "link for a moment" and processes == 1


def judge_untold(faults: Sequence[Suffered], events: Sequence[dict[str, Any]], end: int) -> list[str]:
    """Restarts and failed saves that no fault explains.

    Args:
        end: after this iteration the run was told to end, through the queue.
    """
    known = [event for fault in faults for event in fault.events]
    return [
        f"iteration {event['iteration']}: {event['event']}, and no fault was then"
        for event in events
        if event not in known
        and event["iteration"] < end
        and event["event"] in ("resumed", "failed_save", "preempted")
    ]

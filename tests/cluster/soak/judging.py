"""A seed's verdict, from its ledger and its run's logs, and a run without faults."""

from megatron_eagle.training.monitoring.metrics import EVENTS_FILE, METRICS_FILE, read_events, read_steps
from tests.cluster.soak.ledger import LOGS, Ledger, Verdict, add, layouts
from tests.cluster.soak.reference import uninterrupted
from tests.cluster.soak.running import BATCH, LAST_STEPS, PROCESSES, SAVES_EVERY
from tests.cluster.soak.verdict import (
    OTHER_LAYOUT,
    is_untouched,
    judge_fault,
    judge_losses,
    judge_order,
    judge_untold,
    largest_difference,
)


def judge(ledger: Ledger) -> Verdict:
    """Make the verdict on a seed that has an end, and add it to the ledger."""
    steps = read_steps(ledger.folder / LOGS / METRICS_FILE)
    events = read_events(ledger.folder / LOGS / EVENTS_FILE)
    lost = ledger.end.lost if ledger.end else "cut off"
    problems = [f"lost: {lost}"] if lost else []
    disorder = judge_order(steps, BATCH)
    problems += disorder
    ways, off = layouts(events, PROCESSES), 0.0
    untouched = [fault.number for fault in ledger.faults if is_untouched(fault, ways)]
    for fault in ledger.faults:
        if fault.number not in untouched:
            problems += judge_fault(fault, events, SAVES_EVERY)
    last = steps[-1].iteration if steps else 0
    if not lost:
        problems += judge_untold(ledger.faults, events, last - LAST_STEPS)
    if steps and not disorder:
        problems += judge_losses(steps, uninterrupted(ledger.folder, ways, last))
        if len(ways) > 1:
            off = largest_difference(steps, uninterrupted(ledger.folder, [(0, PROCESSES)], last))
            if off > OTHER_LAYOUT:
                problems.append(f"a loss is {off:.1e} off a run of one layout, more than {OTHER_LAYOUT:g}")
    verdict = Verdict(last, ways, off, problems, untouched)
    add(ledger.folder, verdict)
    return verdict

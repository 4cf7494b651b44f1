"""What a rehearsal finds on one rank, counted as it goes."""

from collections import Counter
from dataclasses import dataclass, field

from megatron_eagle.rehearsal.places import place, within

SCHEDULE = "run_schedule"  # what runs in it is done once a microbatch


@dataclass
class Findings:
    """`phase` is the step's, as the trainer tells its observers."""

    phase: str = "start"
    # (phase, whether once a microbatch, what, where)
    syncs: Counter[tuple[str, bool, str, str]] = field(default_factory=Counter)
    problems: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def sync(self, what: str) -> None:
        """The host waits for the device here."""
        self.syncs[self.phase, within(SCHEDULE), what, place(3)] += 1

    def problem(self, what: str) -> None:
        """Something that a GPU would refuse, or compute wrongly."""
        self.problems[what, place(3)] += 1

"""What is kept of a soak: beside the run's own logs, which faults it was given and what became of them.

FOLDER/seed_001/ledger.jsonl   seed, commit and Slurm; a line a fault; the end of the job; the verdict
FOLDER/seed_001/logs           of the run, as they were at its end
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.files import from_record, read_records

LEDGER, LOGS = "ledger.jsonl", "logs"


@dataclass(frozen=True)
class Suffered:
    """A fault, and how the run got over it."""

    number: int
    kind: str
    brief: bool
    place: str  # node or rank
    iteration: int  # the last that was logged before it
    recovered: bool
    why: str = ""  # it was lost
    seconds: float | None = None  # until a step was logged that never had been
    repeated: int = 0  # iterations that were trained again
    passed: int | None = None  # iterations that were logged while a fault for a moment lasted
    events: list[dict[str, Any]] = field(default_factory=list)  # that the run's events.jsonl has of it
    history: list[str] = field(default_factory=list)  # lines of Slurm's logs


@dataclass(frozen=True)
class Head:
    """Of a seed's ledger."""

    seed: int
    commit: str  # "... with changes": the tree was not that of a commit
    slurm: str
    started: str  # date and time


@dataclass(frozen=True)
class End:
    """Of a seed's job."""

    minutes: float  # that it took, with Slurm's start
    lost: str  # why it did not end by itself; empty: it did


@dataclass(frozen=True)
class Verdict:
    """What was found in a seed's logs."""

    iterations: int
    layouts: list[tuple[int, int]]  # (after this iteration, so many processes)
    off: float  # largest relative difference of a loss to a run of one layout
    problems: list[str]
    untouched: list[int] = field(
        default_factory=list
    )  # faults that could not reach the run: they do not count


@dataclass(frozen=True)
class Ledger:
    """A seed's ledger. Without an end it was cut off."""

    folder: Path
    head: Head
    faults: list[Suffered]
    end: End | None
    verdict: Verdict | None


def seed_folder(folder: Path, seed: int) -> Path:
    """Where a seed's files lie."""
    return folder / f"seed_{seed:03}"


def add(folder: Path, record: Head | Suffered | End | Verdict) -> None:
    """A line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LEDGER).open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read(folder: Path) -> Ledger | None:
    """A seed's ledger; None: it has none."""
    records = read_records(folder / LEDGER)
    if not records:
        return None
    faults = [from_record(Suffered, record) for record in records[1:] if "kind" in record]
    verdicts = [Verdict(**record) for record in records[1:] if "problems" in record]
    ends = [End(**record) for record in records[1:] if "lost" in record]
    return Ledger(
        folder, Head(**records[0]), faults, ends[-1] if ends else None, verdicts[-1] if verdicts else None
    )


def read_all(folder: Path) -> Iterator[Ledger]:
    """Of all seeds, in their order."""
    for place in sorted(folder.glob("seed_*")):
        ledger = read(place)
        if ledger is not None:
            yield ledger


def layouts(events: Sequence[dict[str, Any]], processes: int) -> list[tuple[int, int]]:
    """Under how many processes the iterations were trained that a run's log has in the end.

    Args:
        events: of the run.
        processes: of its first start.
    Returns:
        Pairs: after this iteration, so many processes.
    """
    found = [(0, processes)]
    for event in events:
        if event["event"] == "resumed":
            found = [entry for entry in found if entry[0] < event["iteration"]]
            if not found or found[-1][1] != event["processes"]:
                found.append((event["iteration"], event["processes"]))
    return found

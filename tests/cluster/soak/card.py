"""The card of a soak: by kind of fault, out of the ledgers of all seeds that are judged."""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from tests.cluster.soak.ledger import Ledger
from tests.cluster.soak.verdict import name_of
from tests.paths import REPO
from tools.benchmarks.report import card_head

WANTED = 100  # faults
CARD = REPO / "examples" / "cards" / "soak.json"


def rows(ledgers: Iterable[Ledger]) -> list[dict[str, Any]]:
    """A row for each kind of fault that has reached a run."""
    faults = [
        fault
        for ledger in ledgers
        for fault in ledger.faults
        if ledger.verdict and fault.number not in ledger.verdict.untouched
    ]
    found = []
    for name in sorted({name_of(fault) for fault in faults}):
        own = [fault for fault in faults if name_of(fault) == name]
        seconds = [fault.seconds for fault in own if fault.seconds is not None]
        found.append(
            {
                "fault": name,
                "count": len(own),
                "recovered": sum(fault.recovered for fault in own),
                "s to the next step, median": round(median(seconds), 1) if seconds else None,
                "most": max(seconds, default=None),
                "iterations repeated, most": max(fault.repeated for fault in own),
            }
        )
    return found


def card(ledgers: Iterable[Ledger]) -> dict[str, Any]:
    """What all judged seeds say."""
    judged = [ledger for ledger in ledgers if ledger.verdict and ledger.end]
    table = rows(judged)
    title = "seeded faults on a real Slurm of four nodes on one machine: what a run survived"
    head = card_head("soak", title, "make soak", ", ".join({ledger.head.slurm for ledger in judged}))
    seeds = [
        {
            "seed": ledger.head.seed,
            "commit": ledger.head.commit,
            "started": ledger.head.started,
            "minutes": ledger.end.minutes,
            "faults": len(ledger.faults) - len(ledger.verdict.untouched),
            "faults that could not reach it": len(ledger.verdict.untouched),
            "iterations": ledger.verdict.iterations,
            "changes of layout": len(ledger.verdict.layouts) - 1,
            "off one layout": float(f"{ledger.verdict.off:.1e}"),
            "problems": ledger.verdict.problems,
        }
        for ledger in judged
        if ledger.end and ledger.verdict
    ]
    return {
        **head,
        "faults": sum(row["count"] for row in table),
        "lost": sum(row["count"] - row["recovered"] for row in table),
        "minutes": round(sum(ledger.end.minutes for ledger in judged if ledger.end), 1),
        "seeds with problems": sum(bool(ledger.verdict.problems) for ledger in judged if ledger.verdict),
        "rows": table,
        "seeds": seeds,
    }


def write(made: dict[str, Any]) -> Path:
    """Into the card's file; returns it."""
    CARD.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return CARD


def table(made: dict[str, Any]) -> str:
    """Of a card, as pages and the command line have it."""
    shown = made["rows"]
    lines = [f"| {' | '.join(shown[0])} |", "|---|" + "---:|" * (len(shown[0]) - 1)]
    lines += [f"| {' | '.join(_shown(value) for value in row.values())} |" for row in shown]
    problems = [f"seed {seed['seed']}: {problem}" for seed in made["seeds"] for problem in seed["problems"]]
    of = f"{made['faults']} faults over {len(made['seeds'])} seeds in {made['minutes']:g} minutes"
    said = f"{of}, {made['lost']} lost, {made['seeds with problems']} seeds with problems."
    if made["faults"] < WANTED:
        said += f" {WANTED} are wanted: `make soak` and `make soak-card` go on."
    return "\n".join([said, "", *lines, *(["", *problems] if problems else [])])


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

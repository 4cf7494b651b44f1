"""What small runs may tell each other, and how often a host may wait: `budgets.yaml`, made by

    python -m tests.rehearsal.budgets [CELL ...]

A line in it that is new or gone is a change of what a step costs: it is looked at, and committed.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_eagle.rehearsal.messages import RankMessage
from megatron_eagle.rehearsal.rank import RankReport
from tests.rehearsal.cells import CELLS, Cell
from tests.rehearsal.runs import rehearsed

FILE = Path(__file__).with_name("budgets.yaml")
SYNCS = {"once a microbatch": 0, "once a step": 4}
MEMORY = 0.03  # of the planner's formula, that a rank may take beyond it
# The first is rehearsed in `make test`, for other tests too.
LAYOUTS = ("PP2 x ring 2, balanced", "TP2+SP x CP2, cp_tp", "PP2 x VPP2, none")


def told(reports: Sequence[RankReport]) -> dict[str, int]:
    """The messages of all ranks of two steps and an evaluation, by group, operation and place in the code."""
    counts = Counter(
        f"{event.op}, {event.group}, {_without_lines(event.place)}"
        for report in reports
        for event in report.events
        if isinstance(event, RankMessage)
    )
    return dict(sorted(counts.items()))


def _without_lines(place: str) -> str:
    """`file function` of the innermost place: lines move."""
    file, _, function = place.split(" < ")[0].rpartition(" ")
    return f"{file.rsplit(':', 1)[0]} {function}"


def read() -> dict[str, dict[str, int]]:
    """Of each layout."""
    budgets: dict[str, dict[str, int]] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return budgets


def main(names: Sequence[str]) -> None:
    """Write the budgets of these cells anew; of all, without a name."""
    budgets = read() if FILE.exists() else {}
    cells = {str(each): each for each in (Cell(LAYOUTS[0]), *CELLS)}
    for name in names or cells:
        budgets[name] = told(rehearsed(cells[name].config, cells[name].world_size))
    ordered = {name: budgets[name] for name in cells if name in budgets}
    text = yaml.safe_dump(ordered, sort_keys=False, width=200)
    FILE.write_text(f"# Messages of small runs: see budgets.py\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

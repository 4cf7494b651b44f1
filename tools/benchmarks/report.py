"""What a benchmark returns, how it is printed, and what a card records beside its numbers."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Report:
    """A table of measurements: one mapping per row, columns in the order of the first row's keys."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    flags: str = ""
    """Flags of the command line, beside the name, that made this report."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a card also has, and a table has no place for."""

    def table(self) -> str:
        """Aligned plain text."""
        cells = [list(self.rows[0])] + [[_shown(value) for value in row.values()] for row in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, "", *lines])

    def card(self, name: str) -> dict[str, Any]:
        """The report with what is needed to repeat it."""
        command = f"python tools/bench.py {name} {self.flags}".rstrip()
        head = card_head(name, self.title, command, f"Python {platform.python_version()}")
        return {**head, "rows": self.rows, **self.details}


def card_head(name: str, title: str, command: str, machine: str) -> dict[str, str]:
    """What every card begins with: what was measured, and what is needed to repeat it.

    Args:
        machine: what matters of it beside its kind and system.
    """
    git = ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "name": name,
        "title": title,
        "command": command,
        "commit": commit or "unknown",
        "machine": f"{platform.machine()} {platform.system()}, {machine}",
        "date": date.today().isoformat(),
    }


def write_json(report: Report, name: str, path: str) -> None:
    """Write the report's card."""
    Path(path).write_text(json.dumps(report.card(name), indent=2) + "\n", encoding="utf-8")


def interleaved(contestants: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds of each contestant; they take turns, so that noise meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for function in contestants.values():
        function()  # warm up
    for _ in range(repeats):
        for name, function in contestants.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


def progress(message: str) -> None:
    """A line on standard error, so that a table can be redirected."""
    print(message, file=sys.stderr, flush=True)


def _shown(value: str | int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value

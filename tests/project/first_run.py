"""What the README's commands print and take: `make readme` makes a card of it, then the README from it.

    make demo && make test && make readme      on a machine that does nothing else

`make demo` and `make test` leave records in build/records; beside them lies what the demo left in runs/demo.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.errors import UserError, run_cli
from tests.paths import REPO
from tools.benchmarks.report import card_head

CARD = REPO / "examples" / "cards" / "first_run.json"
RECORDS = REPO / "build" / "records"
DEMO = REPO / "runs" / "demo"
OFF = 2.0
"""By what factor a figure may be off."""

_ASK = ["--hf", "runs/demo/hf", "--image", "runs/demo/media/chelsea.png"]
_PROMPT = "What is shown in this picture?"


def measure() -> dict[str, Any]:
    """What stands in the card.

    Raises:
        UserError: `make demo` or `make test` has not passed here yet.
    """
    demo, test = (_record(target) for target in ("demo", "test"))
    asked = [sys.executable, "-W", "ignore", "tools/generate.py", *_ASK, "--prompt", _PROMPT]
    answer = subprocess.run(asked, cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
    screen = (DEMO / "last_screen.txt").read_text(encoding="utf-8").strip().split("\n\n")[0]
    title = "what the README's first commands print, and what they take in time and disk space"
    command, machine = "make demo && make test && make readme", f"Python {platform.python_version()}"
    return card_head("first_run", title, command, machine) | {
        "processor": processor(),
        "torch": torch.__version__,
        "rows": [
            {"what": "environment", "bytes": size(Path(sys.prefix))},
            {"what": "demo", **_times(demo), "bytes": size(DEMO)},
            {"what": "test", **_times(test)},
        ],
        "screen": {"demo": [*screen.splitlines(), demo["said"]], "answer": answer, "test": test["said"]},
    }


def render() -> str:
    """The README's part: a transcript, and a table of times and sizes."""
    card = read_card()
    demo, test, environment = (row(card, what) for what in ("demo", "test", "environment"))
    screen, place = card["screen"], f"{_bytes(environment['bytes'])} (torch {card['torch']})"
    return "\n".join(
        [
            "```console",
            "$ make demo",
            "...",
            *screen["demo"],
            f"$ .venv/bin/python tools/generate.py {' '.join(_ASK)} \\",
            f'      --prompt "{_PROMPT}"',
            screen["answer"],
            "$ make test",
            "...",
            screen["test"],
            "```",
            "",
            "| | time | disk |",
            "|---|---|---|",
            f"| the environment, made once | as the download is | {place} |",
            f"| `make demo` | {_time(demo)} | {_bytes(demo['bytes'])} in `runs/demo` |",
            f"| `make test` | {_time(test)} | |",
            "",
            f"Measured on {card['date']} at commit {card['commit']}, {card['processor']}.",
        ]
    )


def read_card() -> dict[str, Any]:
    """The committed card."""
    return json.loads(CARD.read_text(encoding="utf-8"))


def row(card: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The numbers of one command, or of the environment."""
    (found,) = (numbers for numbers in card["rows"] if numbers["what"] == what)
    return found


def off(card: Mapping[str, Any], what: str, measured: Mapping[str, float], *, alike: bool) -> list[str]:
    """Where a card is off by more than the factor `OFF`.

    Others may work on the same cores: they stretch seconds, but hardly CPU seconds. So the card promises too
    little if CPU seconds are far above, and too much if seconds are far below its own; the latter is no fault
    of the card on a faster processor, nor if it was measured beside other work and says so.

    Args:
        card: as `read_card` gives it.
        what: its row.
        measured: seconds, CPU seconds and bytes, of which any may be missing.
        alike: whether it was measured on the card's processor.

    Returns:
        A line for each number.
    """
    said, lines = row(card, what), []
    at_rest = alike and not _is_busy(said)
    bounds = {"seconds": (at_rest, False), "cpu_seconds": (alike, True), "bytes": (True, True)}
    for name, (below, above) in bounds.items():
        if name not in measured or name not in said:
            continue
        factor = measured[name] / said[name]
        if (above and factor > OFF) or (below and factor < 1 / OFF):
            lines.append(
                f"{what}: {measured[name]:,.0f} {name}, the README says {said[name]:,.0f}: `make readme`"
            )
    return lines


def processor() -> str:
    """Cores and kind of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def size(folder: Path) -> int:
    """Bytes that the files below a folder take on the disk."""
    return sum(
        os.lstat(os.path.join(path, name)).st_blocks * 512
        for path, _, names in os.walk(folder)
        for name in names
    )


def _record(target: str) -> dict[str, Any]:
    file = RECORDS / f"{target}.json"
    if not file.is_file():
        raise UserError(f"{file.relative_to(REPO)} is missing: run `make {target}` first")
    return json.loads(file.read_text(encoding="utf-8"))


def _times(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: record[name] for name in ("seconds", "cpu_seconds", "load") if name in record}


def _time(numbers: Mapping[str, float]) -> str:
    beside = " beside much other work" if _is_busy(numbers) else ""
    return f"{_minutes(numbers['seconds'])}{beside} ({_minutes(numbers['cpu_seconds'])} of CPU time)"


def _is_busy(numbers: Mapping[str, float]) -> bool:
    """Whether so many processes wanted the cores that seconds say little; tests alone start up to eight."""
    return numbers.get("load", 0) > 4 * (os.cpu_count() or 1)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def main() -> None:
    """Write the card, and the README from it."""
    CARD.write_text(json.dumps(measure(), indent=2) + "\n", encoding="utf-8")
    from tests.project.pages import main as write_pages  # which imports this file

    write_pages()


if __name__ == "__main__":
    run_cli(main)

"""`make parity`: every layout's worst error against one process. `--write`: into card and docs/parity.md."""

import argparse
import json
import time

from tests.parallel.cases import ONE_PROCESS, TABLE, Outcome, combine, run, tiny_model
from tests.parallel.harness import launch
from tests.parallel.test_parity import TOLERANCE
from tests.paths import REPO
from tests.project import pages
from tools.benchmarks.report import card_head

CARD = REPO / "examples" / "cards" / "parity.json"


def measure():
    """One row per layout, as it is finished; models of other heads have a process of their own."""
    references: dict[str, Outcome] = {}
    for layout in TABLE:
        eagle, heads = tiny_model(**layout.text), str(layout.text)
        if heads not in references:
            references[heads] = combine(launch(run, 1, ONE_PROCESS, eagle))
        start = time.perf_counter()
        errors = combine(launch(run, layout.world_size, layout, eagle)).errors(references[heads])
        seconds = time.perf_counter() - start
        loss = errors.pop("loss")
        worst, name = max((error, name) for name, error in errors.items())
        yield {
            "layout": layout.name,
            "processes": layout.world_size,
            "loss": float(f"{loss:.1e}"),
            "worst gradient": float(f"{worst:.1e}"),
            "in": name,
            "seconds": round(seconds, 1),
        }


def write(rows: list[dict]) -> None:
    """Record the table in `CARD`, and make docs/parity.md from it."""
    title = "every parallel layout against one process: loss and all gradients"
    card = card_head("parity", title, "make parity", "CPU, gloo") | {"tolerance": TOLERANCE, "rows": rows}
    CARD.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    pages.main()


def main() -> int:
    """Print the table; 1 if a cell is over the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="also record it in its card and docs/parity.md")
    arguments = parser.parse_args()
    print(f"fp32, loss and every gradient, max |g - ref| / max |ref| <= {TOLERANCE:g}\n")
    rows, lines = [], []
    for row in measure():
        if not rows:
            lines += [f"| {' | '.join(row)} |", "|---" * len(row) + "|"]
            print("\n".join(lines))
        lines.append(f"| {' | '.join(map(str, row.values()))} |")
        print(lines[-1], flush=True)
        rows.append(row)
    if arguments.write:
        write(rows)
    return int(any(not max(row["loss"], row["worst gradient"]) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

"""The tables of context parallelism's page, from the card of `bench.py context_parallel`."""

import json
from collections.abc import Iterable, Sequence

from tests.paths import REPO

CARD = REPO / "examples" / "cards" / "context_parallel.json"


def render() -> str:
    """Where each way wins, whole batches, and wall times."""
    card = json.loads(CARD.read_text(encoding="utf-8"))
    rows = card["rows"]
    timed = [row for row in rows if row["wall s"] != "-"]
    batches = [row for row in rows if row["way"].startswith("K") and row not in timed]
    packs = [row for row in rows if row["wins"] and row not in batches]
    sizes = sorted({row["ranks"] for row in packs})
    cells = {(row["packs"], row["tokens"], row["ranks"]): _cell(row) for row in packs}
    kinds = dict.fromkeys((row["packs"], row["tokens"]) for row in packs)
    return "\n".join(
        [
            f"Counted on {card['date']} at commit {card['commit']} ([card](../examples/cards/{CARD.name}); "
            "every way with `--large`).",
            "",
            "The quickest way of a pack, its step over perfect balance, and in brackets what `auto` takes "
            "without Ulysses, by ranks:",
            "",
            *_table(
                ["packs", "tokens", *map(str, sizes)],
                (
                    [kind, f"{tokens:,}", *(cells.get((kind, tokens, size), "") for size in sizes)]
                    for kind, tokens in kinds
                ),
            ),
            "",
            "Whole global batches, four ranks a pack, K packs a sequence:",
            "",
            *_table(
                ["packs", "K", "costliest / mean", "exposed %", "step", "far keys, % of a pack", "keys, MB"],
                (
                    [
                        row["packs"],
                        row["way"].removeprefix("K = "),
                        *(
                            str(row[name])
                            for name in ("costliest/mean", "exposed %", "step", "far keys %", "keys MB")
                        ),
                    ]
                    for row in batches
                ),
            ),
            "",
            "Seconds of the real code on a CPU that others use, too: attention of one layer, forward and "
            "backward, four processes:",
            "",
            *_table(
                ["packs", "way", "costliest / mean", "s"],
                (
                    [
                        row["packs"].removeprefix("CPU, gloo: "),
                        row["way"],
                        str(row["costliest/mean"]),
                        str(row["wall s"]),
                    ]
                    for row in timed
                ),
            ),
        ]
    )


def _cell(row: dict[str, str]) -> str:
    taken = row["auto"].split(",")[0].split()[0]
    return f"{row['way']} {row['step']:.3f} ({taken})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]

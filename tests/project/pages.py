"""The generated parts of all pages, which `make docs` writes again. The rest is written by hand."""

import json
from collections.abc import Callable
from functools import cache, partial

from megatron_eagle.data.inspection.kept_pixels import TYPICAL, kept_table
from megatron_eagle.evaluation.published.facts import FACTS
from megatron_eagle.planning import rates
from tests.cluster.soak import card as soak_card
from tests.paths import REPO
from tests.project import commands, configuration, context_ways, file_map, first_run, floors
from tests.project.markdown import fill, pages


def parity_table() -> str:
    """The table of `make parity`, from its card."""
    card = json.loads((REPO / "examples" / "cards" / "parity.json").read_text(encoding="utf-8"))
    rows = card["rows"]
    lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join([f"Measured on {card['date']} at commit {card['commit']}.", "", *lines])


def planner_table() -> str:
    """Planned and rehearsed memory, and predicted steps, from the card of `bench.py planner`."""
    card = json.loads((REPO / "examples" / "cards" / "planner_rehearsed.json").read_text(encoding="utf-8"))
    names = ["h100", "h200"]
    head = ["case", "stage", "rehearsed GB", "planned GB", "error %"]
    head += [f"{what}, {name}" for name in names for what in ("predicted s", "predicted MFU %")]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in card["rows"]:
        cells = [f"{row['rehearsed']:.2f}", f"{row['planned']:.2f}", f"{row['error %']:+.1f}"]
        for name in names:
            for what in ("predicted s", "predicted MFU %"):
                value = row[f"{what}, {name}"]
                cells.append(value if isinstance(value, str) else f"{value:.1f}")
        lines.append(f"| {row['case']} | {row['pipeline stage']} | {' | '.join(cells)} |")
    return "\n".join([f"Made on {card['date']} at commit {card['commit']}.", "", *lines])


def rehearsal_table(name: str) -> str:
    """What was rehearsed, from a card of `bench.py rehearsal_sweep` or `rehearsal_qwen3`."""
    card = json.loads((REPO / "examples" / "cards" / f"{name}.json").read_text(encoding="utf-8"))
    head = ["case", "layout", "GPUs", "tokens", "ranks run", "with few layers", "matched", "problems"]
    head += ["peak GB", "formula GB", "waits a microbatch", "a step"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for row in card["rows"]:
        names = ("ranks as they are", "of them run", "ranks matched", "problems")
        cells = [row["case"], row["layout"], f"{row['gpus']:,} {row['gpu']}", f"{row['tokens']:,}"]
        cells += [f"{row[name]:,}" for name in names]
        cells += [f"{row['peak GB']:.2f}", f"{row['formula GB']:.2f}"]
        cells += [f"{row['waits a microbatch']:g}", str(row["waits a step"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"Made on {card['date']} at commit {card['commit']}.", "", *lines])


def soak_table() -> str:
    """What runs on Slurm have survived, from the card of `make soak-card`."""
    made = json.loads(soak_card.CARD.read_text(encoding="utf-8"))
    return f"Written on {made['date']} ([card](../cards/soak.json)): {soak_card.table(made)}"


def long_video_table() -> str:
    """What each step of a long video takes, from the card of `bench.py long_video`."""
    card = json.loads((REPO / "examples" / "cards" / "long_video.json").read_text(encoding="utf-8"))
    lines = ["| step | minutes | peak GB |", "|---|---:|---:|"]
    lines += [f"| {row['step']} | {row['minutes']:.1f} | {row['peak GB']:.2f} |" for row in card["rows"]]
    return "\n".join([f"{card['title']}; measured on {card['date']} at commit {card['commit']}.", "", *lines])


def benchmarks_table() -> str:
    """What is read of each published benchmark, and what a score here is held against."""
    lines = ["| benchmark | read as | questions (videos or pictures) | rule | differs from the authors in |"]
    lines.append("|---" * 5 + "|")
    for name, facts in FACTS.items():
        splits = []
        for split in facts.splits:
            media = "" if split.media is None else f" ({split.media:,})"
            mark = "**" if split.name == facts.reference and len(facts.splits) > 1 else ""
            splits.append(f"{mark}{split.name}{mark} {split.questions:,}{media}")
        if facts.reference not in (None, *(split.name for split in facts.splits)):
            splits.append(f"**{facts.reference}** ?")
        lines.append(f"| {name} | {facts.forms} | {'; '.join(splits)} | {facts.rule} | {facts.differs} |")
    sources = dict.fromkeys(split.source for facts in FACTS.values() for split in facts.splits)
    return "\n".join([*lines, "", f"Counts are those of {'; '.join(sources)}."])


PARTS: dict[str, Callable[[], str]] = {
    "floors": floors.floors,
    "phases": floors.phases,
    "first run": first_run.render,
    "file map": file_map.render,
    "parity table": parity_table,
    "context ways": context_ways.render,
    "rates": rates.rates_table,
    "planner table": planner_table,
    "rehearsal table": partial(rehearsal_table, "rehearsal"),
    "rehearsal of qwen3": partial(rehearsal_table, "rehearsal_qwen3"),
    "long video": long_video_table,
    "soak": soak_table,
    "published benchmarks": benchmarks_table,
    "kept pixels": lambda: kept_table(TYPICAL),
    "configuration": configuration.render,
    "commands": commands.render,
}
"""What stands in each generated part, by its name."""


def main() -> None:
    """Write every page again whose generated parts are not up to date, and say which."""
    parts = {name: cache(render) for name, render in PARTS.items()}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, parts)) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"written to {page.relative_to(REPO)}")


if __name__ == "__main__":
    main()

"""The report of a preflight: a line for each node, and a line for each finding."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from megatron_eagle.preflight.judgement import Finding, FindingKind, Gathered, rate_text

_HEAD = ("node", "processes", "GPUs", "free", "clock", "best pair", "")


def report_lines(gathered: Gathered, findings: Sequence[Finding], seconds: float) -> Iterator[str]:
    """Its lines.

    Args:
        seconds: that the preflight took.
    """
    ranks = gathered.ranks
    yield f"preflight: {_count(len(ranks), 'node')}, {_count(gathered.processes, 'process')}, {seconds:.1f} s"
    rows = [_HEAD, *(_row(gathered, node, findings) for node in {**gathered.expected, **ranks})]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    yield from _exchanged(gathered)
    yield from map(str, findings)
    if all(finding.kind == FindingKind.NOTE for finding in findings):
        yield "preflight: nothing stands in the way"


def _row(gathered: Gathered, node: str, findings: Sequence[Finding]) -> tuple[str, ...]:
    ranks, first = gathered.ranks.get(node, []), gathered.first.get(node)
    gpus = {gpu.uuid: gpu.name for r in ranks if r in gathered.reports for gpu in gathered.reports[r].gpus}
    models = [f"{len(list(group))} {name}" for name, group in groupby(sorted(gpus.values()))]
    free = "?" if first is None or not first.free else f"{min(first.free.values()) / 1e9:.1f} GB"
    clock = "?" if node not in gathered.clocks else f"{gathered.clocks[node][0]:+.3f} s"
    rates = [rate for r in ranks if (rate := _best_rate(gathered, r)) is not None]
    pair = rate_text(min(rates)) if rates else "-"
    kinds = {finding.kind for finding in findings if node in finding.nodes} - {FindingKind.NOTE}
    return node, str(len(ranks)), ", ".join(models) or "none", free, clock, pair, ", ".join(sorted(kinds))


def _best_rate(gathered: Gathered, rank: int) -> float | None:
    found = (gathered.exchanges or {}).get(rank)
    return max(found.rates.values()) if found is not None and found.rates else None


def _exchanged(gathered: Gathered) -> Iterator[str]:
    if gathered.exchanges is None:
        yield "no messages were exchanged: some processes are not there"
        return
    found = gathered.exchanges.values()
    names = dict.fromkeys(name for exchange in found for name in exchange.seconds)
    took = [f"{name} {max(e.seconds[name] for e in found if name in e.seconds):.3f} s" for name in names]
    if took:
        yield "slowest rank: " + ", ".join(took)
    if len(gathered.ranks) == 2 and any(exchange.rates for exchange in found):
        yield "two nodes have one link: whether that is its full rate, and who is slow, is not known"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "es" if word.endswith("s") else "s")

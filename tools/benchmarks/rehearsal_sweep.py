"""Does every layout start, fit and not hang? `rehearsal_cases.py` rehearsed on a CPU, one after another.

Of each case a rank of the first and one of the last pipeline stage run at full depth, and all ranks' messages
are matched with few layers. A case that is done is kept in `runs/rehearsal_sweep` (or `--kept DIR`), and is
not run again while neither it nor a line of the code has changed: a sweep that was stopped goes on. `--case
TEXT` takes only those with these words in their names.

The formula is the planner's memory of the rehearsed ranks' packs. In a pipeline it takes all packs for the
largest of them, so that the rehearsed peak may be well below it; above it by more than 3 % is a problem, and
so are what the GPU has no memory for and a host that waits within a microbatch without a reason: experts are
one, for it must know how many rows each has.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rehearsal_cases import CASES, Case
from benchmarks.report import REPO, Report, progress

from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.planning.planner import RESERVED_BYTES
from megatron_eagle.rehearsal.formula import MARGIN, rank_memory
from megatron_eagle.rehearsal.gpu_types import find_gpu_type
from megatron_eagle.rehearsal.packs import MadeUp
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.rehearsal import Rehearsal, rehearse
from megatron_eagle.rehearsal.report import layout_words, problem_lines, sync_counts, sync_places, traffic

KEPT = REPO / "runs" / "rehearsal_sweep"


def run(kept: str | None = None, case: str | None = None) -> Report:
    """As `rehearse_cases`, of `CASES`."""
    return rehearse_cases(CASES, kept, case)


def rehearse_cases(cases: Sequence[Case], kept: str | None, case: str | None) -> Report:
    """Rehearse what is not done yet.

    Args:
        kept: the folder where cases that are done are kept; None: `KEPT`.
        case: what the names of those that are wanted have; None: all.
    Raises:
        UserError: no case has these words in its name.
    """
    chosen = [each for each in cases if case is None or case in each.name]
    if not chosen:
        names = "; ".join(each.name for each in cases)
        raise UserError(f"--case {case}: no case has that in its name; there are: {names}")
    code, folder = code_hash(), KEPT if kept is None else Path(kept)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, each in enumerate(chosen, 1):
        record, again = done(each, code, folder)
        found.append(record)
        row = record["row"]
        progress(
            f"{number} of {len(chosen)}, {each.name}: {row['layout']}, {row['gpus']} {row['gpu']}: "
            f"{row['problems']} problems, {row['peak GB']:.2f} GB of {row['formula GB']:.2f}, "
            f"{row['waits a microbatch']:g} and {row['waits a step']} waits, "
            f"{row['seconds']:.0f} s{', kept' if again else ''}"
        )
        for line in record["problems"]:
            progress(f"  {line}")
    problems = sum(record["row"]["problems"] for record in found)
    title = f"{len(found)} runs of Eagle 2.5 rehearsed: {problems} problems"
    details = {
        name: {record["row"]["case"]: record[name] for record in found}
        for name in ("problems", "waits of the host", "messages")
    }
    return Report(
        title, [record["row"] for record in found], "" if case is None else f"--case {case}", details
    )


def code_hash() -> str:
    """Of all code that a rehearsal runs."""
    digest = hashlib.sha256()
    for folder in ("megatron_eagle", "kernels"):
        for file in sorted((REPO / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(REPO)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def done(case: Case, code: str, folder: Path) -> tuple[dict[str, Any], bool]:
    """What was found in a case, and whether that was kept from before."""
    key = hashlib.sha256(f"{code}{case!r}".encode()).hexdigest()[:16]
    file = folder / f"{key}.json"
    if file.exists():
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record, True
    started = time.perf_counter()
    found = rehearse(case.plan(), len(os.sched_getaffinity(0)))
    record = describe(case, found, time.perf_counter() - started)
    write_whole(file, json.dumps(record))
    return record, False


def describe(case: Case, found: Rehearsal, seconds: float) -> dict[str, Any]:
    """A row of the table, and what does not fit into one."""
    reports = [report for report in found.reports if report.failure is None]
    grid, formulas = found.plan.grid, {report.rank: _formula(case, report) for report in reports}
    most = max(reports, key=lambda report: report.peak, default=RankReport(0, 1, 0.0))
    step, microbatch = sync_counts(found.everyone)
    problems = [*problem_lines(found), *_too_much(case, reports, formulas)]
    if microbatch and not case.has_to_wait:
        problems.append(f"the host waits {microbatch:g} times a microbatch")
    row = {
        "case": case.name,
        "layout": layout_words(case.config.layout, case.gpus),
        "gpus": case.gpus,
        "gpu": case.gpu,
        "tokens": case.config.data.sequence_length,
        "ranks as they are": len(found.reports),
        "ranks matched": grid.world_size,
        "of them run": len(found.speakers),
        "problems": len(problems),
        "peak GB": most.peak / 1e9,
        "formula GB": formulas.get(most.rank, 0) / 1e9,
        "waits a microbatch": microbatch,
        "waits a step": step,
        "seconds": seconds,
    }
    return {
        "row": row,
        "problems": problems,
        "waits of the host": [
            {"phase": phase, "in the schedule": inside, "what": what, "where": where, "times": count}
            for (phase, inside, what, where), count in sync_places(found.everyone)
        ],
        "messages": _by_group(max(reports, key=_sent)) if reports else {},
    }


def _formula(case: Case, report: RankReport) -> int:
    loader = MadeUp(case.config.model, case.kinds)
    memory = rank_memory(case.config, case.gpu, case.gpus, report.rank, report.microbatches, loader)
    return memory.total


def _too_much(case: Case, reports: list[RankReport], formulas: Mapping[int, int]) -> Iterator[str]:
    room = find_gpu_type(case.gpu).gpu.memory - RESERVED_BYTES
    for report in reports:
        formula = formulas[report.rank]
        if report.peak > room:
            yield f"rank {report.rank}: {report.peak / 1e9:.2f} GB do not fit into {room / 1e9:.1f}"
        if report.peak > formula * (1 + MARGIN):
            yield (
                f"rank {report.rank}: {report.peak / 1e9:.2f} GB, and the planner's formula says "
                f"{formula / 1e9:.2f}"
            )


def _sent(report: RankReport) -> int:
    return sum(nbytes for _, nbytes in traffic(report).values())


def _by_group(report: RankReport) -> dict[str, dict[str, list[float]]]:
    """Of two steps and an evaluation of the rank that moves most: how many, and GB."""
    groups: dict[str, dict[str, list[float]]] = {}
    for (group, op), (count, nbytes) in sorted(traffic(report).items()):
        groups.setdefault(group, {})[op] = [count, nbytes / 1e9]
    return groups

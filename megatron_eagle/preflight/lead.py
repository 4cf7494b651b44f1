"""Rank 0's part in a preflight: it says what is next, hears everybody, judges, and tells the end."""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, write_whole
from megatron_eagle.preflight.exchange import Exchange
from megatron_eagle.preflight.folders import SECONDS as SEEN_WITHIN
from megatron_eagle.preflight.judgement import Finding, FindingKind, Gathered, judge
from megatron_eagle.preflight.meeting import Meeting, ended_within
from megatron_eagle.preflight.node import Report
from megatron_eagle.preflight.nodes import PINGS
from megatron_eagle.preflight.places import Places, places_of, why_no_space
from megatron_eagle.preflight.report import report_lines
from megatron_eagle.preflight.rounds import process_pairs
from megatron_eagle.runtime.slurm_step import step_nodes
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.stages import load_stages

# A mistake of the user has the status of every UserError.
FINE, MISTAKE, BAD_NODE = 0, 2, 3
_PING_SECONDS = 5.0


@dataclass(frozen=True)
class PreflightRequest:
    """What the user asks for.

    Attributes:
        seconds: how long each part may take: until all have come, the look, the messages.
        meet_seconds: until all have come, where that may take longer.
        written: folders that all nodes write, beside those of the configuration.
        exclude_slow: a slow node counts as bad.
        bad_nodes: a file for the names of bad nodes, a line each.
    """

    config: str
    overrides: Sequence[str] = ()
    stage: str | None = None
    seconds: float = 120.0
    meet_seconds: float | None = None
    written: Sequence[str] = ()
    exclude_slow: bool = False
    bad_nodes: str | None = None


def lead(meeting: Meeting, request: PreflightRequest, environment: Mapping[str, str]) -> int:
    """Conduct the preflight and print its report; returns the exit status, which all processes get.

    Raises:
        UserError: the run's configuration is wrong, here on rank 0's node, or its data.
    """
    began = time.monotonic()
    status, others = MISTAKE, set(range(1, meeting.process.processes))
    try:
        configs, places = _within(request, lambda: _open(request, meeting.process.processes))
        gathered = _gather(meeting, request, environment, places)
        others &= gathered.nodes.keys()
        findings = judge(gathered, gpus_promised=_promised(environment))
        findings += _without_space(gathered, configs)
        findings.sort(key=lambda finding: list(FindingKind).index(finding.kind))
        print(*report_lines(gathered, findings, time.monotonic() - began), sep="\n", flush=True)
        status = _status(findings, request)
    finally:
        meeting.announce("places", None)  # where they still wait for it
        meeting.announce("verdict", status)
        meeting.hear("left", others, 2.0)  # the store ends with this process
    return status


def _within(
    request: PreflightRequest, work: Callable[[], tuple[list[RunConfig], Places]]
) -> tuple[list[RunConfig], Places]:
    try:
        return ended_within(request.seconds, work)
    except TimeoutError:
        raise UserError(
            f"rank 0 could not read {request.config} and what it names within {request.seconds:g} s: does "
            "a file system hang?"
        ) from None


def _open(request: PreflightRequest, processes: int) -> tuple[list[RunConfig], Places]:
    configs = load_stages(request.config, request.overrides, stage=request.stage, world_size=processes)
    return configs, places_of(request.config, configs, request.written)


def _gather(
    meeting: Meeting, request: PreflightRequest, environment: Mapping[str, str], places: Places
) -> Gathered:
    ranks = range(meeting.process.processes)
    started = step_nodes(environment)
    if sum(started.values()) != len(ranks):  # torchrun's, one for each node
        started = {}
    gathered = Gathered(len(ranks), request.seconds, started, meeting=request.meet_seconds)
    meeting.announce("places", asdict(places))
    gathered.nodes = meeting.hear("here", ranks, request.meet_seconds or request.seconds)
    records = meeting.hear("report", gathered.nodes, request.seconds)
    gathered.reports = {rank: Report.of_record(record) for rank, record in records.items()}
    first = {node: found.rank for node, found in gathered.first.items()}
    gathered.clocks = {node: clock for node, rank in first.items() if (clock := _clock(meeting, rank))}
    _compare_folders(meeting, request, gathered, first)
    if len(gathered.reports) == len(ranks):
        blind = any(found.cuda is None for found in gathered.reports.values())
        pairs = process_pairs(list(gathered.ranks.values()))
        # A message that does not come may be waited for twice: by the others, and by the end.
        meeting.announce("exchange", ("gloo" if blind else "nccl", pairs, request.seconds / 2))
        told = meeting.hear("exchange", ranks, request.seconds)
        gathered.exchanges = {rank: _exchange_of(record) for rank, record in told.items()}
    else:
        meeting.announce("exchange", None)
    gathered.at = meeting.hear("at", gathered.nodes, 0.1)
    return gathered


def _exchange_of(record: dict[str, object]) -> Exchange:
    found = from_record(Exchange, record)
    found.rates = {int(rank): rate for rank, rate in found.rates.items()}
    return found


def _clock(meeting: Meeting, rank: int) -> tuple[float, float] | None:
    """Seconds that a node's clock is ahead of this one's, and how much more or less it may be.

    This node's clock alone says how long an answer took, and that it was given meanwhile.
    """
    best: tuple[float, float] | None = None
    for number in range(PINGS):
        asked, began = time.time(), time.perf_counter()
        meeting.announce(f"ping/{rank}/{number}", None)
        answer = meeting.hear(f"pong/{number}", [rank], _PING_SECONDS)
        half = (time.perf_counter() - began) / 2
        if not answer:
            return best
        if best is None or half < best[1]:
            best = answer[rank] - (asked + half), half
    return best


def _compare_folders(
    meeting: Meeting, request: PreflightRequest, gathered: Gathered, first: Mapping[str, int]
) -> None:
    """Let each node write where most nodes have a folder, and look for what the others have written."""
    there = [report.there for report in gathered.first.values()]
    folders = {
        Counter(found[folder] for found in there if folder in found).most_common(1)[0][0]
        for folder in {folder for found in there for folder in found}
    }
    meeting.announce("folders", (secrets.token_hex(4), sorted(folders)))
    told = meeting.hear("wrote", first.values(), request.seconds)
    errors = {node: told[rank] for node, rank in first.items() if rank in told}
    gathered.unwritten = {node: found for node, found in errors.items() if found}
    gathered.wrote = {
        folder: [node for node, found in errors.items() if not any(folder in text for text in found)]
        for folder in sorted(folders)
    }
    meeting.announce("look", gathered.wrote)
    told = meeting.hear("saw", first.values(), SEEN_WITHIN + request.seconds)
    gathered.saw = {node: told[rank] for node, rank in first.items() if rank in told}


def _without_space(gathered: Gathered, configs: Sequence[RunConfig]) -> list[Finding]:
    found = []
    for config in configs:
        root = str(Path(config.checkpoint.path).absolute())
        reasons = {
            node: why_no_space(config, report.free[root])
            for node, report in gathered.first.items()
            if root in report.free
        }
        short = {node: reason for node, reason in reasons.items() if reason is not None}
        if short:
            everywhere = len(short) == len(reasons)
            text = next(iter(short.values()))
            kind = FindingKind.MISTAKE if everywhere else FindingKind.BAD
            found.append(Finding(kind, () if everywhere else tuple(short), text))
    return found


def _promised(environment: Mapping[str, str]) -> bool:
    return environment.get("SLURM_GPUS_ON_NODE", "0") != "0"


def _status(findings: Sequence[Finding], request: PreflightRequest) -> int:
    if any(finding.kind == FindingKind.MISTAKE for finding in findings):
        return MISTAKE
    kinds = {FindingKind.BAD, FindingKind.SLOW} if request.exclude_slow else {FindingKind.BAD}
    bad = [finding for finding in findings if finding.kind in kinds]
    names = {node for finding in bad for node in finding.nodes}
    if request.bad_nodes is not None and names:
        _add_names(Path(request.bad_nodes), names)
    return BAD_NODE if bad else FINE


def _add_names(file: Path, names: set[str]) -> None:
    """To those that are there: a node where no Python starts is named by who started it."""
    known = file.read_text().split() if file.exists() else []
    write_whole(file, "".join(f"{name}\n" for name in sorted({*known, *names})))

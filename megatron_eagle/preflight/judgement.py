"""What follows from the reports of all processes: which node is bad, what the user has to mend, what to know.

What is wrong on every node alike is no node's fault. Of values that must be the same, most nodes have the
right one; where as many have another it cannot be known, and both are named.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import TypeVar

from megatron_eagle.preflight.exchange import Exchange
from megatron_eagle.preflight.gpu_state import GpuState
from megatron_eagle.preflight.node import Report
from megatron_eagle.preflight.rounds import slow_ones

V = TypeVar("V", bound=Hashable)
# Seconds, less what the round trip leaves open. Where times of several nodes meet (certificates, signed
# addresses, a file's age) minutes would matter; a clock that is kept is right within milliseconds.
MOST_SKEW = 5.0
_SHOWN = 4


class FindingKind(StrEnum):
    """Whose affair a finding is."""

    BAD = "bad node"
    SLOW = "slow node"
    MISTAKE = "mistake"  # of who started it: another node would not help
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """Something to say: on which nodes, what, and what to do."""

    kind: FindingKind
    nodes: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.nodes)}{': ' if self.nodes else ''}{self.text}"


@dataclass
class Gathered:
    """What rank 0 has heard.

    Attributes:
        seconds: that each part may take.
        expected: node -> processes, as Slurm has started them; empty where nobody says.
        nodes: of each rank that has come.
        at: of each rank, what it last said that it begins.
        clocks: node -> seconds that its clock is ahead of rank 0's, and how much more or less it may be.
        unwritten: node -> what it could not write.
        wrote, saw: folder -> who has written there, and whom each node sees there.
        exchanges: by rank; None: there was none.
        meeting: seconds until all had to be there; None: `seconds`.
    """

    processes: int
    seconds: float
    expected: dict[str, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    at: dict[int, str] = field(default_factory=dict)
    reports: dict[int, Report] = field(default_factory=dict)
    clocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    unwritten: dict[str, list[str]] = field(default_factory=dict)
    wrote: dict[str, list[str]] = field(default_factory=dict)
    saw: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    exchanges: dict[int, Exchange] | None = None
    meeting: float | None = None

    @property
    def first(self) -> dict[str, Report]:
        """Of each node, the report of its first process."""
        return {report.node: report for report in self.reports.values() if report.local == 0}

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Those of each node that has come."""
        found = defaultdict(list)
        for rank, node in sorted(self.nodes.items()):
            found[node].append(rank)
        return dict(found)


def judge(gathered: Gathered, *, gpus_promised: bool) -> list[Finding]:
    """All there is to say.

    Args:
        gpus_promised: Slurm has given the job GPUs.
    """
    return [
        *missing(gathered),
        *unfit_files(gathered),
        *different_code(gathered),
        *unseen_files(gathered),
        *wrong_clocks(gathered.clocks),
        *unfit_gpus(gathered, promised=gpus_promised),
        *wrong_messages(gathered),
        *slow_nodes(gathered),
    ]


def usual(values: Mapping[str, V]) -> V | None:
    """What most nodes have; None: no value has most of them."""
    ranking = Counter(values.values()).most_common(2)
    if len(ranking) == 2 and ranking[0][1] == ranking[1][1]:
        return None
    return ranking[0][0] if ranking else None


def missing(gathered: Gathered) -> Iterator[Finding]:
    """Processes that have not come, or have come and say nothing any more."""
    ranks, limit = gathered.ranks, f"within {gathered.seconds:g} s"
    late = f"within {gathered.meeting or gathered.seconds:g} s"
    for node, count in gathered.expected.items():
        if absent := count - len(ranks.get(node, [])):
            yield Finding(
                FindingKind.BAD,
                (node,),
                f"{absent} of its processes ({count}) have not come {late}: does it live, does Python start "
                "there, is rank 0's host reached from there?",
            )
    unheard = [str(rank) for rank in range(gathered.processes) if rank not in gathered.nodes]
    if unheard and not gathered.expected:
        text = f"of ranks {_some(unheard)} nothing was heard {late}: were all processes started?"
        yield Finding(FindingKind.BAD, (), text)
    for node, own in ranks.items():
        told: Mapping[int, object] = gathered.reports
        if gathered.exchanges is not None:
            told = gathered.exchanges
        silent = [rank for rank in own if rank not in told]
        if silent:
            at = gathered.at.get(silent[0], "the start")
            listed = ", ".join(map(str, silent))
            yield Finding(
                FindingKind.BAD, (node,), f"rank {listed} came, and then said nothing more {limit}, at: {at}"
            )


def unfit_files(gathered: Gathered) -> Iterator[Finding]:
    """What cannot be read or written."""
    problems: dict[str, set[str]] = defaultdict(set)
    for node, report in gathered.first.items():
        for text in [*report.problems, *gathered.unwritten.get(node, [])]:
            problems[text].add(node)
    for text, nodes in problems.items():
        everywhere = nodes == set(gathered.first)
        if everywhere:
            yield Finding(FindingKind.MISTAKE, (), f"on all nodes: {text}")
        else:
            yield Finding(FindingKind.BAD, tuple(sorted(nodes)), text)
    free = gathered.first
    for folder in {folder for report in free.values() for folder in report.there}:
        there = {node: report.there[folder] for node, report in free.items() if folder in report.there}
        where = usual(there)
        if where is None:
            listed = ", ".join(f"{path} on {node}" for node, path in there.items())
            yield Finding(FindingKind.MISTAKE, tuple(there), f"{folder}: what is there of it is {listed}")
            continue
        for node, path in there.items():
            if path != where:
                yield Finding(
                    FindingKind.BAD,
                    (node,),
                    f"{folder}: only {path} is there, and {where} elsewhere: is its file system mounted?",
                )


def different_code(gathered: Gathered) -> Iterator[Finding]:
    """Another commit, other code, other packages."""
    records = {
        node: {"commit": report.commit or "unknown", "code": f"of fingerprint {report.source}"}
        | report.versions
        for node, report in gathered.first.items()
    }
    names = {name for record in records.values() for name in record}
    other: dict[str, list[str]] = defaultdict(list)
    unclear: list[str] = []
    for name in sorted(names, key=lambda name: (name != "commit", name != "code", name)):
        values = {node: record.get(name, "absent") for node, record in records.items()}
        if name == "commit":  # where git cannot tell, the code does
            values = {node: value for node, value in values.items() if value != "unknown"}
        if len(set(values.values())) < 2:
            continue
        right = usual(values)
        if right is None:
            unclear.append(f"{name} {', '.join(f'{value} on {node}' for node, value in values.items())}")
            continue
        for node, value in values.items():
            if value != right:
                other[node].append(f"{name} {value} ({right})")
    for node, texts in other.items():
        yield Finding(
            FindingKind.BAD,
            (node,),
            f"other than most nodes, which have what is in brackets: {_some(texts)}: make it the same",
        )
    if unclear:
        yield Finding(FindingKind.MISTAKE, (), f"nodes differ: {_some(unclear)}: make them the same")


def unseen_files(gathered: Gathered) -> Iterator[Finding]:
    """Folders that are not one and the same on all nodes."""
    for folder, writers in gathered.wrote.items():
        sees = {node: frozenset(gathered.saw.get(node, {}).get(folder, ())) for node in writers}
        if all(seen == frozenset(writers) for seen in sees.values()):
            continue
        right = usual(sees)
        if right is None or len(right) * 2 <= len(writers):
            listed = "; ".join(
                f"{node} sees {', '.join(sorted(seen)) or 'none'}" for node, seen in sees.items()
            )
            yield Finding(
                FindingKind.MISTAKE,
                tuple(writers),
                f"{folder} is not one folder for them, of what each has written there: {listed}: name a "
                "folder on a file system that all nodes share",
            )
            continue
        for node, seen in sees.items():
            if seen != right:
                yield Finding(
                    FindingKind.BAD,
                    (node,),
                    f"{folder} is another folder there: it sees what {', '.join(sorted(seen)) or 'nobody'} "
                    f"has written, and not what {_some(sorted(right - seen))} has: is the right one mounted?",
                )


def wrong_clocks(clocks: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Clocks that differ, measured by rank 0's alone, which may itself be the wrong one."""
    if len(clocks) < 2:
        return
    ahead = {node: seconds for node, (seconds, _) in clocks.items()}
    if len(clocks) == 2:
        (one, two), apart = clocks, max(ahead.values()) - min(ahead.values())
        if apart - sum(slack for _, slack in clocks.values()) > MOST_SKEW:
            text = f"their clocks are {apart:.1f} s apart, and which one is wrong two cannot tell: is NTP on?"
            yield Finding(FindingKind.MISTAKE, (one, two), text)
        return
    middle = median(ahead.values())
    for node, seconds in ahead.items():
        if abs(seconds - middle) - clocks[node][1] > MOST_SKEW:
            way = "ahead of" if seconds > middle else "behind"
            text = f"its clock is {abs(seconds - middle):.1f} s {way} the others': is NTP on?"
            yield Finding(FindingKind.BAD, (node,), text)


def unfit_gpus(gathered: Gathered, *, promised: bool) -> Iterator[Finding]:
    """Too few GPUs, other ones than elsewhere, and what ails them."""
    gpus = {
        node: {
            gpu.uuid: gpu for rank in ranks if rank in gathered.reports for gpu in gathered.reports[rank].gpus
        }
        for node, ranks in gathered.ranks.items()
    }
    if not promised and not any(gpus.values()):
        return
    names = {node: ", ".join(sorted({gpu.name for gpu in own.values()})) for node, own in gpus.items()}
    counts, name = {node: len(own) for node, own in gpus.items()}, usual(names)
    for node, own in gpus.items():
        processes = len(gathered.ranks[node])
        if len(own) < processes:
            yield Finding(
                FindingKind.BAD, (node,), f"{len(own)} GPUs, and {processes} processes want one each"
            )
        elif (count := usual(counts)) is not None and len(own) != count:
            yield Finding(FindingKind.BAD, (node,), f"{len(own)} GPUs, and {count} on other nodes")
        if own and name and names[node] != name:
            yield Finding(FindingKind.BAD, (node,), f"its GPUs are {names[node]}, and {name} on other nodes")
        ranks = [rank for rank in gathered.ranks[node] if rank in gathered.reports]
        blind = [rank for rank in ranks if gathered.reports[rank].cuda is None]
        if blind and len(own) >= processes:
            text = (
                f"torch finds no GPU for rank {', '.join(map(str, blind))}: driver, or a torch without CUDA?"
            )
            yield Finding(FindingKind.BAD, (node,), text)
        yield from _ailing(node, own.values())
    for text, what in (("persistence mode is off: starts take longer", "persistence"), ("ECC is off", "ecc")):
        off = [node for node, own in gpus.items() if any(getattr(gpu, what) is False for gpu in own.values())]
        if off:
            yield Finding(FindingKind.NOTE, tuple(off), text)


def _ailing(node: str, gpus: Iterable[GpuState]) -> Iterator[Finding]:
    for gpu in gpus:
        if gpu.ecc_errors:
            text = (
                f"GPU {gpu.index} has had {gpu.ecc_errors} memory errors that ECC could not correct: reset it"
            )
            yield Finding(FindingKind.BAD, (node,), text)
        if gpu.slowdowns:
            text = f"GPU {gpu.index} is held down: {', '.join(gpu.slowdowns)}: look at cooling and power"
            yield Finding(FindingKind.BAD, (node,), text)


def wrong_messages(gathered: Gathered) -> Iterator[Finding]:
    """Collectives that failed, and bytes that came otherwise than they were sent."""
    if gathered.exchanges is None:
        return
    found = gathered.exchanges
    failed = {rank: exchange.error for rank, exchange in found.items() if exchange.error is not None}
    if failed and len(found) == gathered.processes:  # or they wait for those that are silent
        texts = {gathered.nodes[rank]: text for rank, text in failed.items()}
        listed = _some([f"{node}: {text}" for node, text in texts.items()])
        yield Finding(FindingKind.MISTAKE, (), f"messages do not get through: {listed}")
    links = {
        (gathered.nodes[sender], gathered.nodes[exchange.rank])
        for exchange in found.values()
        for sender in exchange.wrong_from
    }
    counts = Counter(node for link in links for node in set(link))
    most = max(counts.values(), default=0)
    for node in sorted(node for node, count in counts.items() if count == most):
        text = f"other bytes arrive than were sent, {_some([f'from {a} to {b}' for a, b in sorted(links)])}"
        yield Finding(FindingKind.BAD, (node,), text)
    wrong = sorted({gathered.nodes[exchange.rank] for exchange in found.values() if exchange.wrong})
    if wrong and not links:
        yield Finding(FindingKind.MISTAKE, tuple(wrong), "an all-reduce has other sums than it must have")


def slow_nodes(gathered: Gathered) -> Iterator[Finding]:
    """Nodes whose messages are slow, whomever they meet."""
    rates = {
        exchange.rank: max(exchange.rates.values())
        for exchange in (gathered.exchanges or {}).values()
        if exchange.rates and exchange.error is None
    }
    slow: dict[str, list[int]] = defaultdict(list)
    for rank in slow_ones(rates):
        slow[gathered.nodes[rank]].append(rank)
    for node, ranks in slow.items():
        worst = min(ranks, key=lambda rank: rates[rank])
        which = "" if len(ranks) == len(gathered.ranks[node]) else f" of rank {', '.join(map(str, ranks))}"
        text = (
            f"the best pair{which} reaches {rate_text(rates[worst])}, and the median is "
            f"{rate_text(median(rates.values()))}: look at its network"
        )
        if len(gathered.ranks) == 2:  # one link, of which either end may be the cause
            yield Finding(FindingKind.NOTE, tuple(gathered.ranks), text)
            break
        yield Finding(FindingKind.SLOW, (node,), text)


def rate_text(rate: float) -> str:
    """In MB/s or GB/s."""
    return f"{rate / 1e9:.1f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def _some(texts: Sequence[str]) -> str:
    rest = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

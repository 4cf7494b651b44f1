"""The soak's schedule and its verdict, without a Slurm: what is wrong with a run is noticed."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from megatron_eagle.training.monitoring.metrics import StepMetrics
from tests.cluster.soak import card
from tests.cluster.soak.faults import DOING
from tests.cluster.soak.ledger import End, Head, Suffered, Verdict, add, layouts, read
from tests.cluster.soak.schedule import KINDS, schedule
from tests.cluster.soak.verdict import (
    EVENTS,
    HISTORY,
    is_untouched,
    judge_fault,
    judge_losses,
    judge_order,
    judge_untold,
    name_of,
)

PACKS, INTERVAL = 4, 4
RESUMED = {"iteration": 8, "event": "resumed", "repeated": 2, "processes": 1}
KILL = Suffered(1, "rank", False, "n1", 10, True, seconds=5.0, repeated=2, events=[RESUMED])

SLURMD = ["slurmd-n1: slurmd started"]


def steps(count: int = 6) -> list[StepMetrics]:
    return [
        StepMetrics(k, 6.0 - 0.01 * k, 1.0, 1e-5, 1024, 0.2, 0.01, first_pack=PACKS * (k - 1), packs=PACKS)
        for k in range(1, count + 1)
    ]


def test_schedules_are_of_their_seed() -> None:
    """In each round every kind, briefly and for long in turns; fewer nodes are followed by more."""
    first, again, other = (list(islice(schedule(seed), 40)) for seed in (1, 1, 2))
    assert first == again != other
    assert KINDS.keys() == DOING.keys()
    for start in range(0, 40, len(KINDS)):
        kinds = [fault.kind for fault in first[start : start + len(KINDS)]]
        assert sorted(kinds) == sorted(KINDS)
        assert kinds[kinds.index("fewer nodes") + 1] == "more nodes"
    for kind in ("slurmd", "link"):
        assert {fault.brief for fault in first[:20] if fault.kind == kind} == {True, False}
    assert (
        {name_of(Suffered(1, f.kind, f.brief, "", 1, True)) for f in first} == EVENTS.keys() >= HISTORY.keys()
    )


def test_lost_and_repeated_data_is_noticed() -> None:
    good = steps()
    assert not judge_order(good, PACKS)
    for bad in (
        good[:2] + good[3:],  # a step is lost
        good[:3] + good[2:],  # a step twice
        [*good[:3], replace(good[3], first_pack=8), *good[4:]],  # samples again
        [*good[:3], replace(good[3], first_pack=16), *good[4:]],  # samples left out
        [*good[:3], replace(good[3], packs=3), *good[4:]],
        [*good[:3], replace(good[3], data={"seed": 1}), *good[4:]],
    ):
        assert judge_order(bad, PACKS)


def test_another_loss_is_noticed() -> None:
    good = steps()
    assert not judge_losses(good, steps())
    for bad in (replace(good[3], loss=good[3].loss * (1 + 1e-15)), replace(good[3], grad_norm=2.0)):
        assert judge_losses([*good[:3], bad, *good[4:]], good)
    assert judge_losses(good[:-1], good)


def test_what_is_lost_or_not_told_is_noticed() -> None:
    assert not judge_fault(KILL, [RESUMED], INTERVAL)
    for bad, events in (
        (KILL, []),  # the run's log has lost it
        (replace(KILL, events=[]), [RESUMED]),  # it was never told
        (replace(KILL, repeated=5), [RESUMED]),
        (replace(KILL, recovered=False, why="the job is FAILED"), [RESUMED]),
        (replace(KILL, kind="node"), [RESUMED]),  # Slurm's log has nothing of it
        (replace(KILL, kind="link", brief=True, events=[], passed=2), []),  # no step has waited for it
        (replace(KILL, kind="slurmd", brief=True, events=[], history=SLURMD, passed=0), []),  # one has
    ):
        assert judge_fault(bad, events, INTERVAL)
    for kind, passed in (("link", 0), ("slurmd", 7)):
        brief = replace(KILL, kind=kind, brief=True, events=[], history=SLURMD, passed=passed)
        assert not judge_fault(brief, [], INTERVAL)
    assert is_untouched(replace(KILL, kind="link", brief=True), [(0, 2), (8, 1)])
    for fault, ways in ((KILL, [(0, 1)]), (replace(KILL, kind="link", brief=True), [(0, 1), (8, 2)])):
        assert not is_untouched(fault, ways)
    assert not judge_untold([KILL], [RESUMED, {**RESUMED, "iteration": 90}], 80)
    assert judge_untold([KILL], [RESUMED, {**RESUMED, "iteration": 12}], 80)


def test_layouts_are_those_that_the_log_has_in_the_end() -> None:
    """Two processes from the start, one from 8 on; it falls back behind 12 where it had two again."""
    resumed = [(8, 1), (12, 2), (10, 1), (16, 1), (20, 2)]
    events = [{"event": "resumed", "iteration": at, "processes": count} for at, count in resumed]
    assert layouts(events, 2) == [(0, 2), (8, 1), (20, 2)]


@pytest.mark.parametrize("problems", [[], ["iteration 3: loss"]], ids=["right", "wrong"])
def test_cards_count_what_is_judged(problems: list[str], tmp_path: Path) -> None:
    for seed, judged in ((1, True), (2, False)):
        folder = tmp_path / f"seed_{seed:03}"
        add(folder, Head(seed, "abc", "slurm 22", "now"))
        add(folder, KILL)
        add(folder, replace(KILL, number=2, recovered=seed == 1 and not problems, seconds=7.0))
        add(folder, End(2.0, ""))
        if judged:
            add(folder, Verdict(20, [(0, 2)], 0.0, problems))
    ledgers = [ledger for seed in (1, 2) if (ledger := read(tmp_path / f"seed_{seed:03}"))]
    made = card.card(ledgers)
    assert (made["faults"], made["lost"], made["minutes"]) == (2, len(problems), 2.0)
    assert made["rows"][0]["count"] == 2 and made["seeds with problems"] == len(problems)
    assert ("seed 1: iteration 3: loss" in card.table(made)) == bool(problems)

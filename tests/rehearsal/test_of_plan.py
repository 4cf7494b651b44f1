"""`plan --rehearse`: a line for each layout, with what was planned beside what was found."""

import re
from dataclasses import replace

import pytest

from megatron_eagle.planning.planner import PackShape, plan_layouts
from megatron_eagle.planning.rates import Machine
from megatron_eagle.rehearsal import of_plan
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.rehearsal import Rehearsal
from megatron_eagle.runtime.gpus import GPUS
from tests.rehearsal.runs import LENGTH, small_run


@pytest.fixture
def planned():
    """A small run, and its layouts on two GPUs."""
    config = small_run({})
    config = replace(config, training=replace(config.training, global_batch_size=4))
    packs = PackShape.assumed(LENGTH, config.model.tokens_per_tile)
    return config, plan_layouts(config, 2, 80e9, packs, Machine.of(GPUS["h100"])).legal


@pytest.mark.slow
def test_a_layout_is_rehearsed(planned):
    config, plans = planned
    pipeline = next(plan for plan in plans if plan.parallel.pipeline_model_parallel_size == 2)
    [line] = of_plan.rehearse_plans([pipeline], config, "h100", 2, data=False)
    found = re.fullmatch(
        r"1: PP2: (\S+) GB rehearsed, (\S+) planned; (\S+) s predicted, (\S+) planned; 0 problems", line
    )
    assert found, line
    rehearsed, expected, seconds, _ = map(float, found.groups())
    assert 0.5 * expected < rehearsed < 1.5 * expected  # of a few MB, blocks of 512 bytes count
    assert seconds > 0


def test_a_rank_that_stops_is_said(planned, monkeypatch):
    """With the place of its layout; the others go on. A rank of each stage is rehearsed."""
    config, plans = planned
    ranks = []

    def stops(plan, *_, **__):
        ranks.append(plan.ranks)
        failure = "Traceback (most recent call last)\nValueError: no such thing"
        return Rehearsal(plan, [RankReport(rank, 4, 0.0, failure) for rank in plan.ranks], [], None)

    monkeypatch.setattr(of_plan, "rehearse", stops)
    lines = list(of_plan.rehearse_plans(plans, config, "h100", 2, data=True))
    assert [line.split(":")[0] for line in lines] == [str(n) for n in range(1, len(plans) + 1)]
    assert all(line.endswith("stopped at rank 0: ValueError: no such thing") for line in lines)
    assert ranks == [tuple(range(plan.parallel.pipeline_model_parallel_size)) for plan in plans]

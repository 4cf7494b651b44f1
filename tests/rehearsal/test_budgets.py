"""No wait of the host within a microbatch, few in a step, and no message without a line in the budget."""

from dataclasses import replace
from math import prod

import pytest

from megatron_eagle.rehearsal.messages import RankMessage
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.report import sync_counts
from tests.parallel.cases import cell
from tests.rehearsal.budgets import LAYOUTS, SYNCS, read, told
from tests.rehearsal.runs import rehearsed, replace_in, small_run

MEND = "look at what is new; if it is meant: python -m tests.rehearsal.budgets"


def check(name: str, reports: list[RankReport]) -> None:
    step, microbatch = sync_counts(reports)
    assert microbatch <= SYNCS["once a microbatch"], [report.syncs for report in reports]
    assert 0 < step <= SYNCS["once a step"], [report.syncs for report in reports]
    assert not [problem for report in reports for problem in report.problems]
    assert told(reports) == read()[name], MEND


def test_a_pipeline_with_a_ring(reports: list[RankReport]) -> None:
    check(LAYOUTS[0], reports)


def test_a_message_without_a_line_is_noticed(reports: list[RankReport]) -> None:
    counts = told(reports)
    counts[next(iter(counts))] += 1
    assert counts != read()[LAYOUTS[0]]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS[1:])
def test_other_layouts(name: str) -> None:
    layout = cell(name)
    reports = rehearsed(small_run(layout.parallel), layout.world_size)
    check(name, reports)
    if "cp_tp" in name:  # the encoder's gradients are summed as shards of the data and context parallel ranks
        shares = [elements(report, "sum_encoder_gradients") for report in reports]
        first, second = shares[::2], shares[1::2]
        assert first == second, "tensor parallel ranks sum the same parts"
        # The two shards end within the encoder, at no half of it; whole gradients would be alike.
        assert 0 < min(first) < max(first)


@pytest.mark.slow
def test_plain_torchs_kernels_do_not_wait_either() -> None:
    """Norms, SwiGLU and loss without Triton."""
    config = small_run({})
    config = replace_in(config, layers=replace(config.layers, kernels="eager"))
    step, microbatch = sync_counts(rehearsed(config, 1))
    assert microbatch == SYNCS["once a microbatch"] and 0 < step <= SYNCS["once a step"]


def elements(report: RankReport, place: str) -> int:
    """Of all that a rank sends there."""
    return sum(
        prod(shape)
        for event in report.events
        if isinstance(event, RankMessage) and place in event.place
        for _, shape in event.tensors
    )

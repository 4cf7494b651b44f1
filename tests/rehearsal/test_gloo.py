"""What a rehearsal says that ranks tell each other is what they do tell each other on gloo."""

import pytest

from megatron_eagle.rehearsal.kinds import RankGrid
from megatron_eagle.rehearsal.matching import Trace
from megatron_eagle.rehearsal.packs import PACK_KINDS
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.rehearsal import match_speakers
from megatron_eagle.rehearsal.report import sync_counts
from megatron_eagle.training.run_config import RunConfig
from tests.parallel.cases import cell
from tests.rehearsal.budgets import SYNCS, read, told
from tests.rehearsal.cells import CELLS, Cell
from tests.rehearsal.conftest import RING
from tests.rehearsal.runs import recorded, rehearsed, said, small_run
from tests.rehearsal.test_budgets import MEND


def differences(reports: list[RankReport], heard: list[list]) -> list[str]:
    """Where a rank says something else on gloo."""
    found = []
    for report, real in zip(reports, heard, strict=True):
        ours = said(report.events)
        for number, (here, there) in enumerate(zip(ours, real, strict=False)):
            if here != there:
                found.append(f"rank {report.rank}, message {number}: {here} here, {there} on gloo")
                break
        if len(ours) != len(real):
            found.append(f"rank {report.rank}: {len(ours)} messages here, {len(real)} on gloo")
    return found


def expert_waits(config: RunConfig) -> int:
    """The host waits in every layer of experts: for how many rows each has, and twice to select them."""
    text = config.model.text
    if text.experts is None:
        return 0
    layers = max(map(sum, config.layout.stage_layers(text.num_hidden_layers)))
    return 3 * layers * (2 if "moe" in config.recompute.recompute_modules else 1)


def test_one_layout(reports: list[RankReport]) -> None:
    heard = recorded(small_run(RING.parallel), RING.world_size)
    assert differences(reports, heard) == []
    assert min(map(len, heard)) > 50

    heard[1].pop(20)
    assert differences(reports, heard), "a message more is noticed"


@pytest.mark.slow
@pytest.mark.parametrize("each", CELLS, ids=str)
def test_cells(each: Cell) -> None:
    """Rehearsed once: the same messages as on gloo, those of the budget, and they find each other."""
    config = each.config
    reports = rehearsed(config, each.world_size)
    heard = recorded(config, each.world_size)
    assert differences(reports, heard) == []
    assert told(reports) == read()[str(each)], MEND
    assert not [problem for report in reports for problem in report.problems]
    # That option waits after every message between stages, which is what it is for.
    waits = 2 if config.parallel.batch_p2p_sync else SYNCS["once a microbatch"]
    assert sync_counts(reports)[1] <= waits + expert_waits(config)

    grid = RankGrid(config.layout, each.world_size, len(PACK_KINDS))
    traces = {report.rank: Trace(report.events, report.families) for report in reports}
    assert match_speakers(grid, traces) is None


@pytest.mark.slow
def test_ranks_talk_like_their_speakers() -> None:
    """With four tensor parallel ranks and eight of data: what is derived is what they say themselves."""
    config = small_run(cell("TP4+SP, none").parallel)
    grid = RankGrid(config.parallel, 32, len(PACK_KINDS))
    assert grid.speakers() == [0, 3, 4, 7, 8, 11, 12, 15]
    asked = [2, 17, 30]
    likes = [grid.talks_like(rank) for rank in asked]
    assert likes == [3, 3, 15]
    reports = rehearsed(config, 32, ranks=asked + likes)
    for own, like in zip(reports[:3], reports[3:], strict=True):
        assert said(own.events) == said(like.events)

"""What a rehearsal says that ranks tell each other is what they do tell each other on gloo."""

import pytest

from megatron_eagle.rehearsal.kinds import RankGrid
from megatron_eagle.rehearsal.matching import Trace
from megatron_eagle.rehearsal.packs import PACK_KINDS
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.rehearsal import match_speakers
from tests.parallel.cases import cell
from tests.rehearsal.conftest import RING
from tests.rehearsal.runs import recorded, rehearsed, said, small_run

LAYOUTS = [
    ("TP2+SP, cp_tp", {}),
    ("TP2+SP x CP2, cp_tp", {}),
    ("PP4, none", {}),
    ("PP2 x VPP2, none", {}),
    ("DP4 overlapped, none", {}),
    ("DP2 x CP2 overlapped, cp", {}),
    ("CP2 with padded documents, zigzag_per_document", {}),
    ("CP4, balanced", {"context_parallel_comm": "ranges"}),
    ("CP4, cp", {"context_parallel_comm": "gather", "context_parallel_layout": "zigzag"}),
    ("Ring 4, zigzag_per_document", {}),
    ("TP2+SP x ring 2, balanced", {}),
    ("TP2+SP x Ulysses 2 x CP2, balanced", {}),
    ("Ulysses 2 x gather 2 x ring 2, balanced", {}),
    ("TP2+SP x PP2 x VPP2 x CP2, cp", {}),
]


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


def test_one_layout(reports: list[RankReport]) -> None:
    heard = recorded(small_run(RING.parallel), RING.world_size)
    assert differences(reports, heard) == []
    assert min(map(len, heard)) > 50

    heard[1].pop(20)
    assert differences(reports, heard), "a message more is noticed"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), LAYOUTS, ids=str)
def test_layouts(name: str, changes: dict) -> None:
    layout = cell(name)
    config = small_run(layout.parallel | changes)
    reports = rehearsed(config, layout.world_size)
    assert differences(reports, recorded(config, layout.world_size)) == []

    grid = RankGrid(config.layout, layout.world_size, len(PACK_KINDS))
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

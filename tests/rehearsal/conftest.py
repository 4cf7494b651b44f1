"""One small job's traces, for all tests of this folder."""

import pytest

from megatron_eagle.rehearsal.matching import Trace
from megatron_eagle.rehearsal.rank import RankReport
from tests.parallel.cases import cell
from tests.rehearsal.runs import rehearsed, small_run

RING = cell("PP2 x ring 2, balanced")


@pytest.fixture(scope="session")
def reports() -> list[RankReport]:
    """Two stages of two ranks: a pipeline's messages, a ring's batches, collectives of five groups."""
    return rehearsed(small_run(RING.parallel), RING.world_size)


@pytest.fixture
def traces(reports: list[RankReport]) -> dict[int, Trace]:
    """Of the same, by rank; a test may change them."""
    return {report.rank: Trace(list(report.events), dict(report.families)) for report in reports}

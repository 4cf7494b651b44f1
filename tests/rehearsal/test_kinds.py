"""What is rehearsed: runs of few layers that start, and ranks that together have every kind of pack."""

import pytest

from megatron_eagle.planning.planner import preset_run
from megatron_eagle.rehearsal.kinds import RankGrid, cut_depth
from megatron_eagle.rehearsal.packs import PACK_KINDS
from megatron_eagle.rehearsal.rehearsal import RehearsalPlan
from megatron_eagle.runtime.parallel import ParallelConfig

PP4 = "parallel.pipeline_model_parallel_size=4"


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ([], [[2]]),
        ([PP4], [[2]] * 4),
        ([PP4, "parallel.virtual_pipeline_model_parallel_size=7"], [[1] * 7] * 4),
        ([PP4, "parallel.num_layers_in_first_pipeline_stage=4"], [[2]] * 4),
        ([PP4, "parallel.num_layers_in_last_pipeline_stage=1"], [[2]] * 4),
        ([PP4, "parallel.pipeline_model_parallel_layout=Et*5|t*9|t*9|t*5L"], [[2]] * 4),
        (
            [PP4, "parallel.pipeline_model_parallel_layout=Et|(ttttt|)*5tt|L"],
            [[1, 2], [2, 2], [2, 2], [2, 0]],
        ),
    ],
    ids=str,
)
def test_runs_of_few_layers_are_legal(settings: list[str], stages: list[list[int]]) -> None:
    config = preset_run("eagle2.5-8b", 32768, 4, ["model.text.vocab_size=151674", *settings])
    config.validate(4)
    cut = cut_depth(config)
    cut.validate(4)
    layers = cut.model.text.num_hidden_layers
    assert cut.parallel.stage_layers(layers) == stages
    assert layers == sum(map(sum, stages)) and cut.model.vision.num_hidden_layers == 2
    assert cut_depth(cut) == cut


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
def test_every_kind_of_pack_is_rehearsed_at_full_depth(microbatches: int) -> None:
    settings = ["model.text.vocab_size=151674", "training.global_batch_size=32"]
    config = preset_run("eagle2.5-8b", 32768, 8, settings)
    plan = RehearsalPlan.of(config, "h200", 8, microbatches=microbatches)
    kinds = [plan.grid.place(rank).dp + number for rank in plan.ranks for number in range(microbatches)]
    assert {kind % len(PACK_KINDS) for kind in kinds} == set(range(len(PACK_KINDS)))
    assert len(plan.ranks) <= -(-len(PACK_KINDS) // microbatches)


@pytest.mark.parametrize(
    ("experts", "parts", "classes", "replicas"),
    [(1, 2, 1, 1), (4, 1, 1, 1), (8, 1, 1, 2), (8, 2, 1, 4), (8, 1, 3, 6), (16, 2, 4, 8), (3, 1, 1, 3)],
)
def test_ranks_are_matched_with_all_that_have_the_other_experts(
    experts: int, parts: int, classes: int, replicas: int
) -> None:
    """Groups of experts are of adjacent ranks; TP2 x CP2 are four in a replica."""
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}
    whose = {"expert_model_parallel_size": experts, "expert_tensor_parallel_size": parts}
    grid = RankGrid(ParallelConfig(**sizes, **whose), 48 if classes == 3 or experts == 3 else 32, classes)
    assert list(grid.played) == list(range(replicas))
    together = set(grid.kept())
    for first in range(0, grid.world_size, experts * parts):
        group = set(range(first, first + experts * parts))
        assert group <= together or not group & together
    if experts > 1:
        assert grid.speakers() == grid.kept(), "one more row may go to the first experts"

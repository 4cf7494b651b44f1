"""Stages in Megatron's letters: dealt by hand, balanced by the step's estimate, and what they hold."""

from dataclasses import replace

import pytest

from megatron_eagle.model.presets import preset
from megatron_eagle.model.shapes import PackShapes
from megatron_eagle.planning.memory_model import fullest_stage, peak_memory
from megatron_eagle.planning.memory_shapes import Workload, language_layer
from megatron_eagle.planning.plan_report import render_plan
from megatron_eagle.planning.planner import PackShape, plan_layouts, preset_run
from megatron_eagle.planning.rates import Machine
from megatron_eagle.planning.stage_balance import balanced_layers, layout_letters
from megatron_eagle.runtime.gpus import GPUS
from megatron_eagle.runtime.parallel import ParallelConfig

EAGLE = preset("eagle2.5-8b").complete()
WORKLOAD = Workload(sequence_length=32768, tiles=64, microbatches=8)
GPU_COUNT = 4


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((28, 4, 1, 3.0, 1.0), [[5], [8], [8], [7]]),  # 32 units of work, 8 each
        ((28, 4, 1, 0.0, 0.0), [[7]] * 4),
        ((30, 4, 1, 0.0, 0.0), [[7], [7], [8], [8]]),  # later stages hold fewer microbatches
        ((28, 4, 1, 20.0, 0.0), [[0], [9], [9], [10]]),  # the encoder alone is most of a stage
        ((28, 2, 2, 6.0, 0.0), [[2, 9], [8, 9]]),
        ((4, 2, 3, 9.0, 9.0), [[0, 1, 1], [1, 1, 0]]),  # a part between has a layer, whatever it takes
    ],
)
def test_layers_are_dealt_to_the_stage_with_least_work(sizes, expected):
    assert balanced_layers(*sizes) == expected


def test_fewer_layers_than_parts():
    with pytest.raises(ValueError, match="3 layers are fewer than 4 parts"):
        balanced_layers(3, 2, 3, 0.0, 0.0)


@pytest.mark.parametrize(
    ("chunks", "letters"),
    [
        ([[5], [8], [8], [7]], "Et*5|t*8|t*8|t*7L"),
        ([[0], [2], [2], [2], [1]], "E|(tt|)*3tL"),
        ([[3, 4], [4, 4], [4, 0]], "Et*3|(t*4|)*4L"),
    ],
)
def test_letters_say_the_same_layers(chunks, letters):
    assert layout_letters(chunks) == letters
    parallel = ParallelConfig(
        pipeline_model_parallel_size=len(chunks), pipeline_model_parallel_layout=letters
    )
    assert parallel.stage_layers(sum(map(sum, chunks))) == chunks
    assert parallel.num_model_chunks == len(chunks[0])


@pytest.fixture(scope="module")
def planned():
    """Every layout of four GPUs, and the run, whose own stages are in letters."""
    config = preset_run("eagle2.5-8b", 32768, 64, [])
    config.parallel = ParallelConfig(
        pipeline_model_parallel_size=4, pipeline_model_parallel_layout="Et*4|t*6|t*6|t*12L"
    )
    packs = PackShape.assumed(32768, config.model.tokens_per_tile)
    return plan_layouts(config, GPU_COUNT, 80e9, packs, Machine.of(GPUS["h200"])), config, packs


def test_balanced_stages_are_quickest_and_within_a_layer_of_each_other(planned):
    plans, config, _ = planned
    equal, balanced = {}, {}
    for plan in plans.legal:
        parallel = plan.parallel
        sizes = replace(parallel, pipeline_model_parallel_layout=None)
        if parallel.pipeline_model_parallel_layout is None:
            if parallel.num_layers_in_first_pipeline_stage is None:
                equal[repr(sizes)] = plan
        elif parallel != config.parallel:
            balanced[repr(sizes)] = plan
    assert len(balanced) > 20
    both = [(equal[sizes], plan) for sizes, plan in balanced.items() if sizes in equal]
    assert len(both) >= 8
    for even, plan in both:
        assert plan.time.total <= even.time.total
        seconds = [stage.total for stage in plan.time.stages]
        if plan.parallel.num_model_chunks > 1:
            continue  # every chunk has a layer, also where its stage has too much to do
        layer = (plan.time.stages[1].total - plan.time.stages[1].loss) / plan.time.stages[1].layers
        assert max(seconds) - min(seconds) <= 1.02 * layer
        assert plan.time.stages[0].layers < even.time.stages[0].layers or even.time.stages[-1].loss > layer
    uneven = [
        max(s.total for s in even.time.stages) / min(s.total for s in even.time.stages) for even, _ in both
    ]
    assert max(uneven) > 1.2, "the encoder is seen"


def test_the_runs_own_letters_are_planned_and_shown(planned):
    plans, config, packs = planned
    own = [plan for plan in plans.legal if plan.parallel == config.parallel]
    assert [stage.layers for stage in own[0].time.stages] == [4, 6, 6, 12] and len(own) == 1
    shown = replace(plans, legal=own)
    text = render_plan(shown, config, packs, "4 x a GPU", "rates", top=1)
    line = next(line for line in text.splitlines() if line.startswith("1: "))
    assert "pipeline_model_parallel_layout Et*4|t*6|t*6|t*12L: layers 4, 6, 6, 12; " in line
    first, last = own[0].time.stages[0], own[0].time.stages[-1]
    assert f"{100 * first.encoder / first.total:.0f} % of the first is the encoder's" in line
    assert f"{100 * last.loss / last.total:.0f} % of the last the loss's" in line
    assert 0.2 < first.encoder / first.total < 0.6 and 0 < last.loss < last.total / 3


def test_each_chunk_has_its_own_layers_and_the_fullest_stage_is_found():
    """By hand: the second stage of four with most layers, the third with one more, and unequal chunks."""
    layer = language_layer(PackShapes(EAGLE, ParallelConfig(), 32768), WORKLOAD).total

    def held(letters: str, stage: int) -> int:
        parallel = ParallelConfig(pipeline_model_parallel_size=4, pipeline_model_parallel_layout=letters)
        return peak_memory(EAGLE, parallel, 1, WORKLOAD, stage).activations

    one, two = held("Et|t*8|t*9|t*10L", 2), held("Et|t*8|t*10|t*9L", 2)
    assert two - one == 2 * layer  # two microbatches wait there
    parallel = ParallelConfig(pipeline_model_parallel_size=4, pipeline_model_parallel_layout="E|t|t*20|t*7L")
    assert fullest_stage(EAGLE, parallel, 1, WORKLOAD).stage == 2
    uneven, even = held("Et*6|t|t|t|t|t|t|t*16L", 0), held("Et|t|t|t|t*6|t|t|t*16L", 0)
    assert uneven != even, "in flight are more of the first chunk than of the second"

"""Packs per sequence side by side: uneven packs make joining them pay, equal ones do not."""

from dataclasses import replace

import numpy as np

from megatron_eagle.planning.planner import PackShape, plan_layouts, preset_run
from megatron_eagle.planning.rates import Machine
from megatron_eagle.planning.sequences import render_sequences, sequence_plans, sequence_records
from megatron_eagle.runtime.gpus import find_gpu

LENGTH, GPUS = 32768, 16
GPU = find_gpu("h200")
MACHINE = Machine.of(GPU)


def plans(packs: PackShape, batch: int = 16, gpus: int = GPUS):
    config = preset_run("eagle2.5-8b", LENGTH, batch, ["recompute.language=full"])
    legal = plan_layouts(config, gpus, GPU.memory, packs, MACHINE).legal
    plan = next(
        plan
        for plan in legal
        if plan.parallel.tensor_model_parallel_size == plan.parallel.pipeline_model_parallel_size == 1
        and plan.parallel.context_parallel_size == 2
        and plan.parallel.ulysses_parallel_size == 1
    )
    return sequence_plans(config, plan, gpus, packs, MACHINE)


def uneven_packs() -> PackShape:
    """Half of one document, half of 64: the first have 64 times the attention."""
    squares = np.tile([LENGTH**2, LENGTH**2 // 64], 64).astype(float)
    bounds = ((0, LENGTH), tuple(range(0, LENGTH + 1, 512)))
    return PackShape(16, 16.0, LENGTH, float(squares.mean()), bounds, tuple(squares), (16,) * 128)


def test_uneven_packs_are_joined():
    one, *others = plans(uneven_packs())
    assert [one.packs, *(plan.packs for plan in others)] == [1, 2, 4, 8]
    assert [plan.data_parallel_size for plan in [one, *others]] == [8, 4, 2, 1]
    assert one.waiting > 0.1 * one.seconds
    assert min(others, key=lambda plan: plan.seconds).seconds < 0.97 * one.seconds
    assert others[-1].waiting < 0.2 * one.waiting
    assert others[-1].time.context_parallel > one.time.context_parallel, "keys of more ranks"
    shown = render_sequences([one, *others])
    assert "quickest: 1" not in shown and "waiting for the costliest group" in shown
    assert [record["packs"] for record in sequence_records([one, *others])] == [1, 2, 4, 8]


def test_equal_packs_stay_apart():
    """Nothing to even out, and keys of more ranks to fetch."""
    found = plans(PackShape.assumed(LENGTH, 256))
    assert all(plan.waiting == 0 for plan in found)
    assert "quickest: 1" in render_sequences(found)


def test_tiles_are_those_of_dealt_sequences():
    """Not the most of a pack times the packs: sequences are put together evenly."""
    packs = replace(uneven_packs(), tiles=64, mean_tiles=32.0, pack_tiles=tuple(range(1, 65)) * 2)
    one, *_, eight = plans(packs)
    assert 0.4 < eight.memory.parts["vision"] / one.memory.parts["vision"] < 0.8


def test_what_is_not_legal_is_left_out():
    """Two data parallel ranks: four packs a sequence have no group."""
    found = plans(uneven_packs(), batch=4, gpus=4)
    assert [plan.packs for plan in found] == [1, 2]
    assert "no other number" in render_sequences(found[:1])

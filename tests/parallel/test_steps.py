"""Optimizer steps in every kind of layout: parameters, gradient norms and copies are those of one process."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_eagle.model import language, vision
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training import optimizer
from megatron_eagle.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    build_scheduler,
    gather_parameters,
    wrap_models,
)
from tests.parallel.cases import (
    EXPERTS,
    Layout,
    Outcome,
    cell,
    combine,
    entries,
    global_batch,
    run_schedule,
    tiny_model,
)
from tests.parallel.harness import launch

STEPS = 3
# Clipped in every step, decayed, with a rate that rises, falls and is another one for a part. The eps keeps
# steps in proportion to gradients: with a small one, rounding decides where a gradient is 0.
OPTIMIZER = OptimizerConfig(
    lr=6e-2,
    min_lr=1e-2,
    lr_warmup_iterations=2,
    weight_decay=0.1,
    adam_eps=1e-2,
    clip_grad=0.3,
    lr_multipliers={"vision": 0.5},
)
# max |moved - ref| / max |ref| per tensor; moved is a difference of fp32 numbers that are much larger.
TOLERANCE = 3e-4


def run_steps(layout: Layout, tied: bool = False, layers: LayersConfig | None = None) -> dict:
    """On one rank: what `STEPS` steps moved its parameters by, in the place of gradients (`cases.combine`);
    and the gradient norms."""
    eagle = tiny_model(tie_word_embeddings=tied, **layout.text)
    with model_parallel(ParallelConfig(**layout.parallel)) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"), layers=layers)
        initialize_parameters(models, seed=1)
        before = {p: p.detach().clone() for model in models for p in model.parameters()}
        wrapped = wrap_models(models)
        adam = build_optimizer(OPTIMIZER, wrapped)
        scheduler = build_scheduler(OPTIMIZER, adam, train_iterations=6)
        norms = []
        for _ in range(STEPS):
            adam.zero_grad()
            loss = run_schedule(wrapped, eagle, mesh, global_batch(eagle))
            norms.append(float(adam.step()[1]))
            scheduler.step(1)
        gather_parameters(wrapped)
        return {
            "place": (mesh.tp.rank, mesh.expt_tp.rank),
            "loss": loss,
            "gradients": entries(models, lambda parameter: parameter - before[parameter]),
            "norms": norms,
        }


def steps(name: str, tied: bool = False) -> tuple[Outcome, list[float]]:
    """The last step's loss and the movements of all parameters, whose copies are equal; the norms."""
    layout = cell(name)
    results = launch(run_steps, layout.world_size, layout, tied)
    assert all(result["norms"] == results[0]["norms"] for result in results)
    return combine(results), results[0]["norms"]


@pytest.fixture(scope="module")
def one_process():
    return {tied: steps("one process", tied) for tied in (False, True)}


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("TP2+SP, none", False),
        ("TP2, cp_tp", False),
        ("PP2, none", True),
        ("PP2 x VPP2, none", False),
        ("CP2, cp", False),
        ("DP2, none", False),
        ("DP2 overlapped, none", True),
        pytest.param("TP2+SP x PP2 x CP2, cp_tp", True, marks=pytest.mark.slow),
        pytest.param("DP2 x CP2 overlapped, cp", False, marks=pytest.mark.slow),
    ],
)
def test_steps_equal_those_of_one_process(name, tied, one_process):
    expected, norms = one_process[tied]
    assert min(norms) > OPTIMIZER.clip_grad, "every step is clipped"
    found, found_norms = steps(name, tied)
    assert found_norms == pytest.approx(norms, rel=1e-5)
    errors = found.errors(expected)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize(
    "name",
    [
        "EP2 x TP2+SP",
        pytest.param("EP2 x TP2+SP, divided experts", marks=pytest.mark.slow),
        pytest.param("TP2+SP, whole experts", marks=pytest.mark.slow),
        pytest.param("PP2 x VPP2 x EP2", marks=pytest.mark.slow),
        pytest.param("DP2 x EP2 gathered late", marks=pytest.mark.slow),
    ],
)
def test_steps_of_experts_equal_those_of_one_process(name):
    """The norm counts each expert once, whoever has copies and parts of it."""
    one = launch(run_steps, 1, replace(cell("one process"), text=EXPERTS))
    results = launch(run_steps, cell(name).world_size, cell(name))
    for result in results:
        assert result["norms"] == pytest.approx(one[0]["norms"], rel=1e-5)
    errors = combine(results).errors(combine(one))
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def run_in_small_buckets(layout: Layout, tied: bool, layers: LayersConfig, sabotaged: bool) -> dict:
    """`run_steps` with a bucket for each large parameter, as models have them that are not tiny; `sabotaged`
    where weights are read without a word to Megatron."""
    small = partial(DistributedDataParallelConfig, bucket_size=1000)
    with ExitStack() as patches:
        patches.enter_context(patch.object(optimizer, "DistributedDataParallelConfig", small))
        if sabotaged:
            for module in (vision, language):
                patches.enter_context(patch.object(module, "ready", lambda _: None))
        return run_steps(layout, tied, layers)


def late_steps(name: str, tied: bool, loss: str, sabotaged: bool = False) -> list[dict]:
    layout = cell(name)
    return launch(run_in_small_buckets, layout.world_size, layout, tied, LayersConfig(loss=loss), sabotaged)


@pytest.mark.parametrize(
    ("name", "tied", "loss"),
    [
        ("DP2 gathered late, none", True, "plain"),
        ("DP2 gathered late, none", False, "fused"),
        ("DP2 x PP2 x VPP2 gathered late, none", False, "fused"),
    ],
)
def test_parameters_that_are_gathered_late_are_there(name, tied, loss, one_process):
    expected, norms = one_process[tied]
    results = late_steps(name, tied, loss)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-5)
    errors = combine(results).errors(expected)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def test_a_weight_that_is_read_too_early_is_noticed():
    """Its bucket is still under way when the next step would send it."""
    with pytest.raises(RuntimeError, match="start_param_sync"):
        late_steps("DP2 gathered late, none", False, "fused", sabotaged=True)

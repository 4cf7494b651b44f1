"""Frozen parts, learning rates of parts, new token rows: what moves, what it costs, under which layout."""

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import global_name, initialize_parameters
from megatron_eagle.model.parts import check_parts, freeze
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, build_scheduler, wrap_models
from tests.parallel.cases import (
    ONE_PROCESS,
    cell,
    combine,
    forward_backward,
    global_batch,
    run,
    tiny_model,
)
from tests.parallel.harness import launch

FIRST_NEW_TOKEN = 300


def run_frozen(parallel: dict, trainable: list[str], first_new_token: int | None) -> dict:
    """`cases.run` with frozen parts."""
    eagle = tiny_model()
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"))
        initialize_parameters(models, seed=1)
        freeze(models, trainable, first_new_token)
        return forward_backward(models, eagle, mesh, global_batch(eagle))


@pytest.fixture(scope="module")
def everything():
    return combine(launch(run, 1, ONE_PROCESS, tiny_model()))


@pytest.mark.parametrize(
    ("layout", "trainable"),
    [
        ("TP2+SP x CP2, cp", ["connector"]),
        ("TP2 x CP2, cp_tp", ["connector"]),
        ("PP2, none", ["connector"]),
        ("TP2+SP, cp_tp", ["vision"]),
        ("CP2, cp", ["language"]),
    ],
)
def test_what_is_trained_has_the_same_gradients(layout, trainable, everything):
    where = cell(layout)
    found = combine(launch(run_frozen, where.world_size, where.parallel, trainable, None))
    prefixes = tuple({"vision": "vision_model"}.get(part, part) for part in trainable)
    expected = {name: g for name, g in everything.gradients.items() if name.startswith(prefixes)}
    everything_trained = type(everything)(everything.loss, expected)
    assert found.worst(everything_trained)[0] <= 1e-5


def test_only_new_token_rows_have_gradients(everything):
    trainable = ["connector", "new_token_rows"]
    where = cell("TP2, none")
    found = combine(launch(run_frozen, where.world_size, where.parallel, trainable, FIRST_NEW_TOKEN))
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        expected = everything.gradients[name].clone()
        expected[:FIRST_NEW_TOKEN] = 0
        torch.testing.assert_close(found.gradients[name], expected, rtol=1e-4, atol=1e-7)
    assert not any("layers" in name for name in found.gradients)


def step_once(settings: dict, pipeline: int) -> dict:
    """Parameters before and after one optimizer step, and the elements in gradient buffers."""
    eagle = tiny_model()
    config = OptimizerConfig(
        **{"lr": 1e-2, "lr_decay_style": "constant", "lr_warmup_iterations": 0} | settings
    )
    with model_parallel(ParallelConfig(pipeline_model_parallel_size=pipeline)) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"))
        initialize_parameters(models, seed=1)
        freeze(models, config.trainable, config.first_new_token)
        before = {global_name(n, m): p.detach().clone() for m in models for n, p in m.named_parameters()}
        wrapped = wrap_models(models)
        optimizer = build_optimizer(config, wrapped)
        build_scheduler(config, optimizer, train_iterations=10)
        forward_backward(models, eagle, mesh, global_batch(eagle), wrapped)
        optimizer.step()
        moved = {
            global_name(n, m): p.detach() - before[global_name(n, m)]
            for m in models
            for n, p in m.named_parameters()
        }
        return {"moved": moved, "buffered": sum(b.numel for w in wrapped for b in w.buffers)}


def test_frozen_parts_stay_and_cost_nothing():
    for result in launch(step_once, 2, {"trainable": ("connector",)}, 2):
        connector = {n: d for n, d in result["moved"].items() if n.startswith("connector")}
        assert all(d.abs().max() > 0 for d in connector.values())
        assert all(not d.any() for n, d in result["moved"].items() if n not in connector)
        # Buffers are padded to multiples of 128 elements; a stage without trained parts has none.
        trained = sum(d.numel() for d in connector.values())
        assert trained <= result["buffered"] < trained + 256


def test_old_token_rows_stay_bit_for_bit():
    settings = {"trainable": ("new_token_rows",), "first_new_token": FIRST_NEW_TOKEN, "weight_decay": 0.1}
    [result] = launch(step_once, 1, settings, 1)
    rows = result["moved"]["language_model.output_layer.weight"]
    assert not rows[:FIRST_NEW_TOKEN].any()
    assert rows[FIRST_NEW_TOKEN:504].any()


def test_learning_rate_of_a_part():
    # Adam's first step is the learning rate in every element that has a gradient.
    [result] = launch(step_once, 1, {"lr_multipliers": {"vision": 0.1}, "weight_decay": 0.0}, 1)
    moved = result["moved"]
    assert moved["vision_model.encoder.final_layernorm.weight"].abs().max() == pytest.approx(1e-3, rel=1e-2)
    assert moved["connector.linear_fc1.weight"].abs().max() == pytest.approx(1e-2, rel=1e-2)


def last_rates() -> list[float]:
    """Learning rates of all groups after the last iteration."""
    config = OptimizerConfig(lr=1e-2, min_lr=1e-3, lr_multipliers={"vision": 0.1})
    with model_parallel(ParallelConfig()) as mesh:
        models = build_model(tiny_model(), mesh, torch.device("cpu"))
        initialize_parameters(models, seed=1)
        optimizer = build_optimizer(config, wrap_models(models))
        build_scheduler(config, optimizer, train_iterations=10).step(10)
        return sorted({group["lr"] for group in optimizer.param_groups})


def test_a_part_ends_at_its_own_least_rate():
    [rates] = launch(last_rates, 1)
    assert rates == pytest.approx([1e-4, 1e-3])


@pytest.mark.parametrize(
    ("trainable", "multipliers", "first", "message"),
    [
        (["visoin"], {}, None, "no part 'visoin'"),
        ([], {}, None, "is empty"),
        (["connector"], {"vision": 0.1}, None, "vision: this part is frozen"),
        (["language", "new_token_rows"], {}, 5, "name one of them"),
        (["new_token_rows"], {}, None, "go together"),
    ],
)
def test_contradictions_are_refused(trainable, multipliers, first, message):
    with pytest.raises(UserError, match=message):
        check_parts(trainable, multipliers, first)

"""Experts in every kind of layout: loss and all gradients of one process, auxiliary loss and all."""

from unittest.mock import patch

import pytest

from megatron_eagle.model import experts
from megatron_eagle.model.specs import RecomputeConfig
from tests.mutants.mutant import Mutant
from tests.parallel.cases import EXPERT_LAYOUTS as LAYOUTS
from tests.parallel.cases import EXPERTS as TEXT
from tests.parallel.cases import ONE_PROCESS, Outcome, cell, combine, run, tiny_model
from tests.parallel.harness import launch
from tests.parallel.test_parity import TOLERANCE

QUICK = ("EP2 x TP2+SP", "EP2 x CP2", "PP2 x EP2")
slow = pytest.mark.slow


def model(**changed):
    return tiny_model(**{**TEXT, "experts": {**TEXT["experts"], **changed}})


def error_of(name: str, reference: Outcome, function=run, *more, **changed) -> float:
    layout = cell(name)
    results = launch(function, layout.world_size, layout, model(**changed), *more)
    return combine(results, check_replicas=False).worst(reference)[0]


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return combine(launch(run, 1, ONE_PROCESS, model()))


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=() if each.name in QUICK else slow) for each in LAYOUTS], ids=str
)
def test_layout_equals_one_process(layout, reference):
    found = combine(launch(run, layout.world_size, layout, model()))
    errors = found.errors(reference)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def test_every_gradient_of_the_reference_is_alive(reference):
    dead = [name for name, gradient in reference.gradients.items() if not gradient.abs().max() > 1e-6]
    assert dead == []
    assert sum(".mlp.experts." in name for name in reference.gradients) == 4 * 8 * 2


# What is dropped: a part of its call site's name. Each in a layout that must notice.
DROPPED = {
    "tokens to their experts": ("EP2 x CP2", "MoEAlltoAllTokenDispatcher.token_dispatch"),
    "results to their tokens": ("EP2 x CP2", "MoEAlltoAllTokenDispatcher.token_combine"),
    "gradients of tokens and results": ("EP2 x CP2", "_AllToAll.backward"),
    "what other ranks chose": ("EP2 x CP2", "balance_loss"),
    "gradients of routers over tensor parallel ranks": (
        "EP2 x TP2+SP",
        "_allreduce_non_tensor_model_parallel_grads",
    ),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=slow if number else ()) for number, what in enumerate(DROPPED)]
)
def test_a_dropped_message_is_noticed(what, reference):
    name, place = DROPPED[what]
    with Mutant("collective", place, part=True).in_force():
        assert error_of(name, reference) > 100 * TOLERANCE


def test_unnormalised_probabilities_are_noticed(reference):
    assert error_of("EP2 x CP2", reference, norm_topk_prob=False) > 100 * TOLERANCE


_BALANCE = experts.balance_loss


def _once_per_rank(scores, chosen, rows, group):
    """The whole of the loss on every rank that has a part of it."""
    return _BALANCE(scores, chosen, rows, group) * group.size()


def _times_local_tokens(scores, chosen, rows, group):
    """As Megatron has it for losses that a token count will divide."""
    return _BALANCE(scores, chosen, rows, group) * len(scores)


def _without_padding_left_out(scores, chosen, rows, group):
    return _BALANCE(scores, chosen, experts.PackRows(rows.member * 0 + 1, rows.tokens, rows.share), group)


def run_with_balance(name: str, *arguments) -> dict:
    with patch.object(experts, "balance_loss", globals()[name]):
        return run(*arguments)


def _sabotaged(layout, eagle, name) -> dict:
    return run_with_balance(name, layout, eagle)


@pytest.mark.parametrize(
    "wrong",
    [_once_per_rank, _times_local_tokens, pytest.param(_without_padding_left_out, marks=slow)],
)
def test_another_auxiliary_loss_is_noticed(wrong, reference):
    assert error_of("EP2 x CP2", reference, _sabotaged, wrong.__name__) > 100 * TOLERANCE


@pytest.mark.slow
def test_an_auxiliary_loss_of_weight_0_is_none(reference):
    one = combine(launch(run, 1, ONE_PROCESS, model(router_aux_loss_coef=0.0)))
    assert one.worst(reference)[0] > 100 * TOLERANCE
    assert error_of("EP2 x CP2", one, router_aux_loss_coef=0.0) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["EP2 x TP2+SP", "EP2 x CP2", "PP2 x VPP2 x EP2"])
@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig("selective", recompute_modules=("core_attn", "moe")),
        RecomputeConfig("full"),
        RecomputeConfig("offload", offload_keep_last=1),
    ],
    ids=lambda recompute: recompute.language,
)
def test_recomputation_is_exact(layout, recompute, reference):
    found = combine(launch(_recomputed, cell(layout).world_size, cell(layout), model(), recompute))
    assert found.worst(reference)[0] <= TOLERANCE


def _recomputed(layout, eagle, recompute) -> dict:
    return run(layout, eagle, recompute=recompute)

"""The fused output layer and loss in every kind of layout against Megatron's own loss in one process."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from eagle_kernels import linear_cross_entropy as module
from megatron_eagle.model import language
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.specs import RecomputeConfig
from tests.mutants.mutant import Mutant
from tests.parallel.cases import ONE_PROCESS, Layout, Outcome, cell, combine, run, tiny_model
from tests.parallel.harness import launch

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32
FUSED, INTO_MAIN_GRAD = LayersConfig(loss="fused"), LayersConfig(loss="fused", loss_into_main_grad=True)
CHUNK = 7  # tokens: several chunks a pack, none full at the end


def _run_in_chunks(
    layout: Layout, eagle, layers: LayersConfig, recompute: RecomputeConfig, pipelined: bool = True
) -> dict:
    whole, options = language.linear_cross_entropy, {"chunk_size": CHUNK, "pipelined": pipelined}
    with patch.object(language, "linear_cross_entropy", lambda *a, **k: whole(*a, **options, **k)):
        return run(layout, eagle, torch.float32, recompute, layers)


def _fused(name: str, layers: LayersConfig, recompute: str = "none", **text) -> Outcome:
    layout = cell(name)
    arguments = (layout, tiny_model(**text), layers, RecomputeConfig(recompute))
    return combine(launch(_run_in_chunks, layout.world_size, *arguments))


@pytest.fixture(scope="module")
def plain() -> Outcome:
    return combine(launch(run, 1, ONE_PROCESS, tiny_model()))


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("one process", FUSED),
        pytest.param("TP2, none", FUSED, marks=pytest.mark.slow),
        ("TP4+SP, none", INTO_MAIN_GRAD),
        pytest.param("CP2, none", FUSED, marks=pytest.mark.slow),
        ("PP2 x VPP2, none", INTO_MAIN_GRAD),
        pytest.param("DP4 overlapped, none", INTO_MAIN_GRAD, marks=pytest.mark.slow),
        ("TP2+SP x CP2, none", FUSED),
        ("TP2+SP x PP2 x CP2, none", INTO_MAIN_GRAD),
    ],
)
def test_equals_the_plain_loss(layout, layers, plain):
    errors = _fused(layout, layers).errors(plain)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ("one process", INTO_MAIN_GRAD),
        ("PP2, none", INTO_MAIN_GRAD),
    ],
)
def test_tied_embeddings(layout, layers):
    tied = {"tie_word_embeddings": True}
    reference = combine(launch(run, 1, ONE_PROCESS, tiny_model(**tied)))
    assert _fused(layout, layers, **tied).worst(reference)[0] <= TOLERANCE


def test_recomputed_layers_leave_the_loss_alone(plain):
    assert _fused("TP2, none", INTO_MAIN_GRAD, "full").worst(plain)[0] <= TOLERANCE


@pytest.mark.parametrize("layers", [FUSED, INTO_MAIN_GRAD], ids=["own gradient", "main_grad"])
def test_two_chunks_under_way_change_no_bit(layers):
    arguments = (cell("TP2+SP, none"), tiny_model(), layers, RecomputeConfig())
    two, one = (combine(launch(_run_in_chunks, 2, *arguments, pipelined)) for pipelined in (True, False))
    assert two.loss == one.loss
    assert [n for n, gradient in one.gradients.items() if not torch.equal(two.gradients[n], gradient)] == []


def _over_ranks(bad: float | None) -> list[torch.Tensor]:
    """Losses, and gradients of the input and of this rank's rows, with padding rows."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 8, generator=generator), torch.randn(16, 8, generator=generator)
    labels, token_weights = torch.arange(9) + 1, torch.rand(9, generator=generator)
    if bad is not None:
        x[4, 0] = bad
    x.requires_grad_()
    own = weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    losses = module.linear_cross_entropy(
        x,
        own,
        labels,
        token_weights,
        group=dist.group.WORLD,
        vocab_size=13,
        chunk_size=2,
    )
    torch.dot(losses, token_weights).backward()
    return [losses.detach(), x.grad, own.grad]


def test_losses_and_gradients_over_ranks():
    [one], ranks = launch(_over_ranks, 1, None), launch(_over_ranks, 4, None)
    for losses, grad_x, _ in ranks:
        torch.testing.assert_close(losses, one[0])
        torch.testing.assert_close(grad_x, one[1])
    torch.testing.assert_close(torch.cat([grad for *_, grad in ranks]), one[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_reaches_its_token_on_every_rank(bad):
    for losses, grad_x, grad in launch(_over_ranks, 2, bad):
        assert (~losses.isfinite()).nonzero().flatten().tolist() == [4]
        assert grad_x.isnan().any(1).nonzero().flatten().tolist() == [4] and grad.isnan().any()


def _logged() -> list[str]:
    """The order of products and all-reduces for three chunks."""
    log, add = [], module._add_product

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        name = "MAX" if op == dist.ReduceOp.MAX else "SUM"
        log.append(f"start {name}")
        work = dist.all_reduce(tensor, op=op, group=group, async_op=True)
        return SimpleNamespace(wait=lambda: (log.append(f"end {name}"), work.wait()))

    def statistics(*arguments):
        log.append("logits")
        return found(*arguments)

    def add_product(*arguments):
        log.append("gradients")
        add(*arguments)

    found = module._statistics
    with (
        patch.object(module, "dist", SimpleNamespace(all_reduce=all_reduce, ReduceOp=dist.ReduceOp)),
        patch.object(module, "_statistics", statistics),
        patch.object(module, "_add_product", add_product),
    ):
        weight = torch.randn(8, 4, requires_grad=True)
        labels = torch.arange(6)
        module.linear_cross_entropy(
            torch.randn(6, 4), weight, labels, torch.ones(6), group=dist.group.WORLD, chunk_size=2
        )
    return log


def test_all_reduces_travel_beside_products():
    begin = ["logits", "start MAX"]
    middle = [*begin, "end SUM", "gradients", "end MAX", "start SUM"]
    expected = [*begin, "end MAX", "start SUM", *middle, *middle, "end SUM", "gradients"]
    assert launch(_logged, 2) == [expected, expected]


@pytest.mark.parametrize(
    "place",
    [" in _Chunk.start_maximum <", " in _Chunk.start_sums <", " in _LinearCrossEntropy.backward <"],
    ids=["maximum", "sum", "gradient of the input"],
)
def test_a_dropped_all_reduce_is_noticed(place, plain):
    arguments = (cell("TP2, none"), tiny_model(), FUSED, RecomputeConfig())
    with Mutant("collective", place, part=True).in_force():
        results = launch(_run_in_chunks, 2, *arguments)
    assert combine(results, check_replicas=False).worst(plain)[0] > 100 * TOLERANCE

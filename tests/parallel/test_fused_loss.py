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
from tests.parallel.cases import LAYOUTS, ONE_PROCESS, Layout, Outcome, combine, run, tiny_model
from tests.parallel.harness import launch

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32
FUSED, INTO_MAIN_GRAD = LayersConfig(loss="fused"), LayersConfig(loss="fused", loss_into_main_grad=True)
CHUNK = 7  # tokens: several chunks a pack, none full at the end


def _cell(name: str) -> Layout:
    return next(cell for cell in (*LAYOUTS, ONE_PROCESS) if cell.name == name)


def _run_in_chunks(layout: Layout, eagle, layers: LayersConfig, recompute: RecomputeConfig) -> dict:
    whole = language.linear_cross_entropy
    with patch.object(language, "linear_cross_entropy", lambda *a, **k: whole(*a, chunk_size=CHUNK, **k)):
        return run(layout, eagle, torch.float32, recompute, layers)


def _fused(name: str, layers: LayersConfig, recompute: str = "none", **text) -> Outcome:
    layout = _cell(name)
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


class _WithoutAllReduce(SimpleNamespace):
    """torch.distributed for one module, with an all-reduce that leaves every rank what it had."""

    ReduceOp = dist.ReduceOp

    def __init__(self, dropped: int) -> None:
        super().__init__(calls=0, dropped=dropped)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        self.calls += 1
        # Maximum, then sum, of each chunk; a last one sums the gradient of the input.
        if {dist.ReduceOp.MAX: 0}.get(
            op, 1 if tensor.dim() == 2 and tensor.shape[0] == 2 else 2
        ) != self.dropped:
            dist.all_reduce(tensor, op=op, group=group)


def _run_without(dropped: int) -> dict:
    with patch.object(module, "dist", _WithoutAllReduce(dropped)):
        return _run_in_chunks(_cell("TP2, none"), tiny_model(), FUSED, RecomputeConfig())


@pytest.mark.parametrize("dropped", range(3), ids=["maximum", "sum", "gradient of the input"])
def test_a_dropped_all_reduce_is_noticed(dropped, plain):
    outcome = combine(launch(_run_without, 2, dropped), check_replicas=False)
    assert outcome.worst(plain)[0] > 100 * TOLERANCE

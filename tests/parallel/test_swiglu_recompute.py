"""The MLP's product computed again in backward (`recompute.swiglu`): no other bit, and fewer bytes kept."""

from unittest.mock import patch

import pytest
import torch

from eagle_kernels import swiglu
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.cases import (
    LENGTH,
    ONE_PROCESS,
    Outcome,
    cell,
    combine,
    global_batch,
    run,
    tiny_model,
    with_targets,
)
from tests.parallel.harness import launch
from tests.parallel.test_lora import run_lora


def _differing(one: Outcome, other: Outcome) -> list[str]:
    assert one.gradients.keys() == other.gradients.keys()
    names = [n for n, gradient in one.gradients.items() if not torch.equal(other.gradients[n], gradient)]
    return names + ["loss"] * (one.loss != other.loss)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("one process", "none"),
        pytest.param("TP2+SP, none", "full", marks=pytest.mark.slow),
        ("PP2 x VPP2, none", "offload"),
    ],
)
def test_changes_no_bit(name, policy):
    layout = cell(name)
    plain, again = (
        combine(launch(run, layout.world_size, layout, tiny_model(), torch.float32, recompute))
        for recompute in (RecomputeConfig(policy), RecomputeConfig(policy, swiglu=True))
    )
    assert _differing(plain, again) == []


def test_adapters_read_the_same_product():
    arguments = ({}, LoraConfig(rank=2), ("language",))
    plain, again = (
        combine(launch(run_lora, 1, *arguments, RecomputeConfig(swiglu=swiglu))) for swiglu in (False, True)
    )
    assert _differing(plain, again) == []


def _saved_bytes(recompute: RecomputeConfig) -> int:
    """Bytes of all storages that one forward saves for its backward, parameters left out."""
    eagle, pack = tiny_model(), global_batch(tiny_model())[1]
    with model_parallel(ParallelConfig()) as mesh:
        (model,) = build_model(eagle, mesh, torch.device("cpu"), recompute=recompute)
        initialize_parameters([model], seed=1)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        inputs = make_input(eagle, mesh, torch.device("cpu"), **with_targets(pack))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(inputs)
        return sum(storage.nbytes() for storage in saved.values())


def test_a_layer_keeps_one_product_less():
    [plain], [again] = (launch(_saved_bytes, 1, RecomputeConfig(swiglu=swiglu)) for swiglu in (False, True))
    text = tiny_model().text
    assert plain - again == text.num_hidden_layers * LENGTH * text.intermediate_size * 4


def _run_with_another_product() -> dict:
    forward = swiglu.swiglu

    def wrong(gate_up, implementation="auto", reuse_input=False):
        return forward(gate_up, implementation, reuse_input) * (1.0 if torch.is_grad_enabled() else 1.1)

    with patch.object(swiglu, "swiglu", wrong):
        return run(ONE_PROCESS, tiny_model(), torch.float32, RecomputeConfig(swiglu=True), LayersConfig())


def test_another_product_is_noticed():
    plain = combine(launch(run, 1, ONE_PROCESS, tiny_model()))
    error, name = combine(launch(_run_with_another_product, 1)).worst(plain)
    assert error > 1e-2 and "linear_fc2" in name

"""What experts do not go with is refused before any process group exists, with the rule and what is legal."""

import itertools
import math

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.model.layers import LayersConfig, choose_layers
from megatron_eagle.model.layout_rules import check_layout
from megatron_eagle.model.lora import LoraConfig, check_targets
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.megatron_options import check_megatron_options
from megatron_eagle.training.optimizer import OptimizerConfig
from tests.parallel.cases import EXPERTS, tiny_model

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


def model(**changed):
    return tiny_model(**{**EXPERTS, "experts": {**EXPERTS["experts"], **changed}})


def check(eagle, world_size: int, **parallel) -> None:
    layout = ParallelConfig(**parallel)
    layout.data_parallel_size(world_size, eagle.text.experts and eagle.text.experts.num_experts)
    check_layout(eagle, layout, 64)


@pytest.mark.parametrize(
    ("world_size", "parallel", "reason"),
    [
        (
            12,
            TP2 | {"expert_model_parallel_size": 4},
            "12 processes cannot be divided into expert tensor 2 x expert 4 x pipeline 1: choose "
            "parallel.expert_model_parallel_size 2$",
        ),
        (2, {"expert_model_parallel_size": 4}, "choose parallel.expert_model_parallel_size 2$"),
        (
            8,
            PP2 | {"expert_model_parallel_size": 8},
            "expert 8 x pipeline 2: choose .*expert_model_parallel_size 4$",
        ),
        (
            6,
            {"expert_model_parallel_size": 6},
            "6 does not divide the 8 experts: choose parallel.expert_model_parallel_size 2$",
        ),
        (
            8,
            TP2 | {"expert_tensor_parallel_size": 4},
            "4 divides an expert's matrices otherwise than .*_size 2 the others: choose 1 or 2",
        ),
        (
            4,
            {"tensor_model_parallel_size": 4, "sequence_parallel": True},
            "expert_tensor_parallel_size 4 does not divide the 54 feed-forward .* expert: set it to 1",
        ),
        (
            2,
            {"tensor_model_parallel_size": 2},
            "2 without sequence_parallel .* 2 times: set sequence_parallel to true",
        ),
    ],
)
def test_layouts(world_size, parallel, reason):
    with pytest.raises(UserError, match=reason) as refused:
        check(model(moe_intermediate_size=54), world_size, **parallel)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("parallel", [{}, TP2, TP2 | PP2], ids=str)
def test_what_is_named_is_legal(parallel):
    """Both rules at once: what divides the experts and the ranks."""
    replica = math.prod(size for name, size in parallel.items() if name != "sequence_parallel")
    refused = 0
    for world_size, size in itertools.product(range(replica, 25, replica), range(2, 14)):
        try:
            check(model(), world_size, **parallel, expert_model_parallel_size=size)
        except UserError as error:
            refused += 1
            named = str(error).split("expert_model_parallel_size ")[-1].split(" or ")
            for number in map(int, named):
                check(model(), world_size, **parallel, expert_model_parallel_size=number)
    assert refused > 50


def test_legal_layouts_are_taken():
    for world_size, parallel in [
        (1, {}),
        (12, TP2 | {"expert_model_parallel_size": 2}),
        (4, TP2 | {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}),
        (8, TP2 | PP2 | {"expert_model_parallel_size": 2}),
    ]:
        check(model(), world_size, **parallel)


@pytest.mark.parametrize(
    ("name", "value"), [("expert_model_parallel_size", 2), ("expert_tensor_parallel_size", 1)]
)
def test_a_model_without_experts(name, value):
    with pytest.raises(
        UserError, match=f"{name} {value} divides experts, and the model has none: leave it out"
    ):
        check(tiny_model(), 2, **{name: value})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"recompute": RecomputeConfig("selective", recompute_modules=("mlp",))},
            "mlp: the model has experts in place of MLPs; choose core_attn or moe",
        ),
        (
            {"recompute": RecomputeConfig("selective", recompute_modules=("moe_act",))},
            "moe_act: Megatron computes it again only in Transformer Engine's experts; moe has it; choose",
        ),
        (
            {"recompute": RecomputeConfig(swiglu=True)},
            "swiglu is of an MLP, and the model has experts: choose",
        ),
        ({"layers": LayersConfig(fp8="hybrid")}, "products in 8 bits are not built for experts"),
        (
            {"layers": LayersConfig(moe_token_dispatcher_type="flex")},
            "flex is for experts that ranks divide, and each rank has them all: choose alltoall",
        ),
        (
            {"optimizer": OptimizerConfig(freeze_router=True), "experts": False},
            "freeze_router: the model has no",
        ),
        (
            {"layers": LayersConfig(moe_token_dispatcher_type="flex"), "experts": False},
            "moe_token_dispatcher_type: the model has no experts",
        ),
    ],
)
def test_options(settings, reason):
    given = {
        "parallel": ParallelConfig(),
        "recompute": RecomputeConfig(),
        "layers": LayersConfig(),
        "optimizer": OptimizerConfig(),
        "precision": "bf16",
        "rows": 32,
        "experts": True,
    }
    check_megatron_options(**given)
    with pytest.raises(UserError, match=reason):
        check_megatron_options(**given | settings)


def test_a_dispatcher_that_needs_a_gpu():
    layers, parallel = (
        LayersConfig(moe_token_dispatcher_type="flex"),
        ParallelConfig(expert_model_parallel_size=2),
    )
    with pytest.raises(UserError, match="flex: there is no CUDA device; choose alltoall"):
        choose_layers(layers, model(), parallel)


def test_routers_of_a_frozen_language_model():
    with pytest.raises(UserError, match="freeze_router: the language model is frozen, its routers too"):
        OptimizerConfig(trainable=("connector",), freeze_router=True)


def test_adapters():
    reason = (
        "gate_proj, up_proj, down_proj: .* adapters on experts are not built; choose among q_proj, k_proj, v_"
    )
    with pytest.raises(UserError, match=reason):
        check_targets(LoraConfig(), model())
    check_targets(LoraConfig(target_modules=["q_proj", "o_proj"]), model())
    check_targets(LoraConfig(), tiny_model())

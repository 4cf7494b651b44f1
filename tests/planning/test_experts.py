"""What a rank is said to have of experts against what it has."""

import pytest
import torch

from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.experts import is_expert
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import LocalShapes, StageShapes
from megatron_eagle.planning.memory_shapes import count_parameters
from megatron_eagle.runtime.parallel import model_parallel
from tests.parallel.cases import EXPERTS, Layout, cell, tiny_model
from tests.parallel.harness import launch


def _held(layout: Layout, eagle: EagleConfig) -> list[int]:
    """Elements of experts, ranks that have copies of them, the pipeline stage."""
    with model_parallel(layout.config) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"))
        named = [pair for model in models for pair in model.named_parameters()]
        elements = sum(parameter.numel() for name, parameter in named if is_expert(name))
        return [elements, mesh.expt_dp.size, mesh.pp.rank]


@pytest.mark.parametrize(
    "name",
    [
        "EP2 x TP2+SP",
        pytest.param("EP2 x TP2+SP, divided experts", marks=pytest.mark.slow),
        pytest.param("PP2 x VPP2 x EP2", marks=pytest.mark.slow),
        pytest.param("DP2 x EP2", marks=pytest.mark.slow),
    ],
)
def test_experts_of_a_rank(name):
    layout, eagle = cell(name), tiny_model(**EXPERTS)
    parallel, shapes = layout.config, LocalShapes(eagle, layout.config)
    replicas = parallel.data_parallel_size(layout.world_size) * parallel.context_parallel_size
    for elements, copies, stage in launch(_held, layout.world_size, layout, eagle):
        counted = count_parameters(shapes, StageShapes.of(shapes, stage))
        assert counted.experts == counted.trained_experts(["language"]) == elements
        assert parallel.expert_data_ranks(replicas) == copies

"""The gradient norm counts every parameter once, however it is sharded or copied."""

import pytest
import torch

from megatron_eagle.model.eagle import build_model
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, wrap_models
from tests.parallel.cases import LANGUAGE_MODELS, LAYOUTS, ONE_PROCESS, Layout, tiny_model
from tests.parallel.harness import launch


def squared_norm_of_ones(layout: Layout, text: dict) -> float:
    """With every gradient one, the squared norm is the number of parameters."""
    eagle = tiny_model(**text)
    with model_parallel(ParallelConfig(**layout.parallel)) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"))
        wrapped = wrap_models(models)
        optimizer = build_optimizer(OptimizerConfig(), wrapped)
        for model in models:
            for parameter in model.parameters():
                parameter.main_grad.fill_(1)
        optimizer.prepare_grads()
        return round(float(optimizer.get_grad_norm()) ** 2)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param({}, id="untied"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param(LANGUAGE_MODELS["qwen3"], id="qwen3", marks=pytest.mark.slow),
    ],
)
def test_every_layout_counts_the_same_parameters(text):
    [expected] = launch(squared_norm_of_ones, 1, ONE_PROCESS, text)
    chosen = {"TP2+SP, none", "TP2 x CP2, cp_tp", "PP2 x VPP2, none", "TP2+SP x PP2 x CP2, cp_tp"}
    for layout in LAYOUTS:
        if layout.name in chosen:
            norms = launch(squared_norm_of_ones, layout.world_size, layout, text)
            assert set(norms) == {expected}, layout.name

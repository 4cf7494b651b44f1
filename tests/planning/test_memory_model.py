"""The memory model against torch: saved activations to the byte, peaks of real steps within 15 %."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import LocalShapes, PackShapes, StageShapes
from megatron_eagle.planning.memory_shapes import (
    Workload,
    count_parameters,
    language_layer,
    vision_activations,
    vision_layer,
)
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.cases import EXPERTS, tiny_model
from tests.parallel.harness import launch
from tests.parallel.memory_cells import MORE, QUICK, model
from tests.parallel.memory_run import made_up_pack

TOLERANCE = 0.15


@pytest.mark.parametrize("cell", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str)
def test_peak_of_a_step(cell):
    for rank, measured in enumerate(cell.measure()):
        predicted = cell.predict(rank)
        shapes = LocalShapes(cell.model, ParallelConfig(**cell.parallel))
        parameters = count_parameters(shapes, StageShapes.of(shapes, cell.stage(rank)))
        assert measured["parameters"] == parameters.total
        assert predicted.states >= 300e6
        assert measured["before"] == pytest.approx(predicted.states, rel=TOLERANCE)
        assert measured["peak"] == pytest.approx(predicted.total, rel=TOLERANCE)
        # Without the states, which are easy to count.
        transient = measured["peak"] - measured["before"]
        assert transient == pytest.approx(predicted.total - predicted.states, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("normalised", [True, False])
def test_experts_keep_what_autograd_saves(precision, normalised):
    """To the byte, beside what a layer with an MLP keeps: how many rows an expert gets plays no part."""
    experts = {**EXPERTS["experts"], "norm_topk_prob": normalised}
    texts = {"model_type": "qwen3"}, {**EXPERTS, "experts": experts}
    eagles = [tiny_model(**text, num_hidden_layers=layers) for text in texts for layers in (2, 3)]
    saved = launch(_saved_bytes, 1, eagles, precision)[0]
    workload = Workload(256, 4, 1, precision, device="cpu")
    dense, moe = (
        language_layer(PackShapes(eagle, ParallelConfig(), 256), workload) for eagle in eagles[1::2]
    )
    assert (saved[3] - saved[2]) - (saved[1] - saved[0]) == moe.mlp - dense.mlp


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(precision):
    """To the byte, by adding a layer; the rest (indices and masks of the loss) within a thousandth."""
    eagle = model(504)
    eagle.text.num_hidden_layers = eagle.vision.num_hidden_layers = 2
    deeper, taller = deepcopy(eagle), deepcopy(eagle)
    deeper.text.num_hidden_layers = taller.vision.num_hidden_layers = 3
    base, with_layer, with_encoder_layer = launch(_saved_bytes, 1, [eagle, deeper, taller], precision)[0]
    workload = Workload(256, 4, 1, precision, device="cpu")
    shapes = PackShapes(eagle, ParallelConfig(), 256)
    language, vision = (count(shapes, workload).total for count in (language_layer, vision_layer))
    assert with_layer - base == language
    assert with_encoder_layer - base == vision
    element, width, softmax = workload.element_size, eagle.text.hidden_size, 256 * 512 * 4
    table = 256 * eagle.text.head_dim * element  # of rotary positions
    shared = 256 * (width * (4 + 2 * element) + 4) + table  # with the final norm
    counted = 2 * language + vision_activations(shapes, workload) + shared + softmax
    assert base == pytest.approx(counted, rel=1e-3)
    connector_alone = replace(workload, trainable=("connector",))
    assert vision_activations(shapes, connector_alone) < vision_activations(shapes, workload)


def _saved_bytes(eagles: list[EagleConfig], precision: str) -> list[int]:
    """Bytes of the storages that one forward saves for its backward, parameters left out, per model."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = []
    with model_parallel(ParallelConfig()) as mesh:
        for eagle in eagles:
            (built,) = build_model(eagle, mesh, torch.device("cpu"), dtype)
            initialize_parameters([built], seed=1)
            weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
            saved = {}

            def keep(tensor, weights=weights, saved=saved):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    saved[storage.data_ptr()] = storage
                return tensor

            inputs = make_input(eagle, mesh, torch.device("cpu"), **made_up_pack(eagle, 256, 4, seed=0))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                built(inputs)
            found.append(sum(storage.nbytes() for storage in saved.values()))
    return found

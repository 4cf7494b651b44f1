"""FLOPs against numbers worked out by hand for the 8B model."""

import pytest

from megatron_eagle.model.flops import pair_costs, patch_cost, training_flops
from megatron_eagle.model.presets import preset
from tests.parallel.cases import EXPERTS, tiny_model

# Parameters of the language layers (without norms and biases) and of the output layer.
LAYERS = 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944)
HEAD = 3584 * 151676


def flops(**changes):
    arguments = {"tokens": 32768, "sum_squared_lengths": 32768**2, "tiles": 0} | changes
    return training_flops(preset("eagle2.5-8b").complete(), **arguments)


@pytest.mark.parametrize(("length", "petaflop"), [(32768, 2.04), (65536, 5.37), (131072, 15.9)])
def test_one_document_text_only(length, petaflop):
    found = flops(tokens=length, sum_squared_lengths=length**2)
    assert found.language_linear == 6 * length * (LAYERS + HEAD)
    assert found.language_attention == 6 * length**2 * 3584 * 28
    assert found.total / 1e15 == pytest.approx(petaflop, rel=3e-3)


def test_experts_count_those_that_a_token_is_sent_to():
    """The router, and 2 of 8 experts of three matrices; the MLP's own size plays no part."""
    eagle = tiny_model(**EXPERTS, intermediate_size=99999)
    found = training_flops(eagle, tokens=64, sum_squared_lengths=0, tiles=0).language_linear
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 64 * 8 + 2 * 3 * 64 * 48
    assert found == 6 * 64 * (4 * layer + 64 * 504)


def test_short_documents_cost_less_attention():
    assert flops(sum_squared_lengths=64 * 512**2).language_attention * 64 == flops().language_attention


def test_a_trained_tile():
    """2.9 TFLOP: 1024 patches, 27 layers of 1152 x (4 x 1152 + 2 x 4304), and full attention."""
    found = flops(tiles=1)
    linear = 6 * 1024 * (27 * 1152 * (4 * 1152 + 2 * 4304) + 3 * 14 * 14 * 1152)
    assert found.vision == linear + 12 * 27 * 1024**2 * 1152
    assert found.connector == 6 * 256 * (4608 * 3584 + 3584 * 3584)
    assert (found.vision + found.connector) / 1e12 == pytest.approx(2.96, abs=0.01)


def test_frozen_parts():
    everything = flops(tiles=8)
    stage1 = flops(tiles=8, trainable=["connector"])
    assert stage1.vision == everything.vision / 3  # forward only
    assert stage1.connector == everything.connector
    assert stage1.language_linear == everything.language_linear * 2 / 3  # no weight gradients
    assert stage1.language_attention == everything.language_attention
    only_language = flops(tiles=8, trainable=["language"])
    assert only_language.connector == everything.connector / 3
    assert only_language.language_linear == everything.language_linear


def test_costs_beside_attention():
    """Eagle2.5-8B by hand; the encoder's attention is counted, the output layer is not."""
    eagle = preset("eagle2.5-8b").complete()
    patch = 27 * 2 * (4 * 1152**2 + 2 * 1152 * 4304 + 2 * 1024 * 1152) + 2 * 588 * 1152
    patch += 2 * (4608 * 3584 + 3584**2) / 4  # four patches become one token
    assert patch_cost(eagle) == pytest.approx(patch / (28 * 2 * 3584), rel=1e-12)
    layer = 3584 * (3584 + 2 * 512) + 3584**2 + 3 * 3584 * 18944
    assert pair_costs(eagle).token == round(6 * layer / 600 / (14 * 3584 / 400)) == 18578
    assert pair_costs(eagle).key == round(8 * 1024 / 4 / 300e9 / (14 * 3584 / 400e12)) == 54

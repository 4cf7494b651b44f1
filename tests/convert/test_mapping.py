"""The table: complete, of the released size, exact in both directions, strict about what it is given."""

import math

import pytest
import torch

from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig, VisionConfig, preset
from megatron_eagle.model.text import TextConfig
from tests.parallel.cases import EXPERTS, tiny_model


def small() -> EagleConfig:
    return EagleConfig(
        vision=VisionConfig(num_hidden_layers=1),
        text=TextConfig(num_hidden_layers=1, vocab_size=5),
        image_token_index=4,
    )


def test_8b_has_the_released_tensors_and_parameters():
    eagle = preset("eagle2.5-8b").complete()
    shapes = ModelMapping(eagle, has_head=True).hf_shapes
    assert len(shapes) == 793
    assert sum(map(math.prod, shapes.values())) == 8_070_777_280
    eagle.vision.image_size, eagle.vision.patch_size = 512, 16
    assert sum(map(math.prod, ModelMapping(eagle, has_head=True).hf_shapes.values())) == 8_070_984_640
    head = ModelMapping(eagle, has_head=True).passed_through
    assert (len(head), sum(map(math.prod, head.values()))) == (11, 15_238_352)


def test_every_tensor_survives_both_ways_and_none_is_used_twice():
    plan = ModelMapping(small(), has_head=False)
    hf = {name: torch.randn(shape) for name, shape in plan.hf_shapes.items()}
    model = {entry.model: torch.cat(plan.blocks(entry, hf.__getitem__)) for entry in plan.entries}
    back = list(plan.to_hf(model.__getitem__))
    assert sorted(name for name, _ in back) == sorted(hf)
    assert all(torch.equal(tensor, hf[name]) for name, tensor in back)


def test_queries_lie_beside_their_key_value_head():
    config = small()  # 4 query heads, 2 KV heads, head size 16
    plan = ModelMapping(config, has_head=False)

    def read(name: str) -> torch.Tensor:
        start = {"q_proj": 0, "k_proj": 100, "v_proj": 200}[name.split(".")[-2]]
        rows = 64 if "q_proj" in name else 32
        return start + torch.arange(rows) // 16  # the head's number

    entry = next(
        e for e in plan.entries if e.model.endswith("decoder.layers.0.self_attention.linear_qkv.bias")
    )
    [joined] = plan.blocks(entry, read)
    assert joined[::16].tolist() == [0, 1, 100, 200, 2, 3, 101, 201]


def test_vocabulary_is_padded_with_zeros_and_cut_again():
    plan = ModelMapping(small(), has_head=False)
    hf = {name: torch.ones(shape) for name, shape in plan.hf_shapes.items()}
    [entry] = [e for e in plan.entries if e.model == "language_model.output_layer.weight"]
    rows = torch.cat(plan.blocks(entry, hf.__getitem__))
    assert rows.shape == (512, 64)
    assert rows[:5].eq(1).all() and rows[5:].eq(0).all()


def test_tied_embeddings_have_no_output_layer():
    config = small()
    config.text.tie_word_embeddings = True
    plan = ModelMapping(config, has_head=False)
    assert "language_model.lm_head.weight" not in plan.hf_shapes


def test_misfits_are_named():
    plan = ModelMapping(small(), has_head=True)
    shapes = dict(plan.hf_shapes)
    del shapes["mlp1.3.bias"]
    shapes["mlp2.weight"] = (1,)
    shapes["mlp1.1.bias"] = (7,)
    with pytest.raises(UserError) as error:
        plan.check_hf(shapes, "H")
    for part in ("missing (1) mlp1.3.bias", "unexpected (1) mlp2.weight", "mlp1.1.bias [7] instead of [64]"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_stacked_experts_are_named():
    plan = ModelMapping(tiny_model(**EXPERTS), has_head=False)
    shapes = {name: shape for name, shape in plan.hf_shapes.items() if ".experts." not in name}
    shapes["language_model.model.layers.0.mlp.experts.gate_up_proj"] = (8, 96, 64)
    with pytest.raises(UserError, match="its experts are stacked, .* write the folder again with"):
        plan.check_hf(shapes, "H")

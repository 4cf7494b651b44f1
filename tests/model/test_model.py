"""Sizes, presets and the errors a user can run into before the first step."""

import json

import pytest
import torch

from megatron_eagle.config import from_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.connector import pixel_shuffle
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.layout_rules import check_layout
from megatron_eagle.model.presets import EagleConfig, ModelSection, expand_preset, preset
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.cases import IMAGE_TOKEN, tiny_model
from tests.parallel.harness import launch


def test_preset_8b_has_the_released_sizes():
    eagle = preset("eagle2.5-8b").complete()
    assert eagle.tokens_per_tile == 256
    assert eagle.text.padded_vocab_size == 152064
    assert EagleConfig.from_hf(eagle.to_hf()) == eagle


def test_a_section_wins_over_its_preset():
    section = expand_preset({"preset": "tiny", "text": {"num_hidden_layers": 2}})
    eagle = from_dict(ModelSection, section, where="model")
    assert (eagle.text.num_hidden_layers, eagle.text.hidden_size) == (2, 64)
    with pytest.raises(UserError, match="choose one of tiny, eagle2.5-8b, eagle2.5-1b, eagle2.5-1b-proxy"):
        expand_preset({"preset": "huge"})
    for wrong in ({"preset": ["tiny"]}, {"hf": 5}):
        with pytest.raises(UserError, match=r"model.\w+: expected text, got"):
            expand_preset(wrong)


def test_the_proxy_is_the_8b_model_cut():
    proxy, whole = preset("eagle2.5-1b-proxy").validate(), preset("eagle2.5-8b")
    assert (proxy.text.hidden_size, proxy.vision.hidden_size) == (
        whole.text.hidden_size,
        whole.vision.hidden_size,
    )


def test_sizes_from_hugging_face_files(tmp_path):
    # Qwen2.5-0.5B's published sizes.
    qwen = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(qwen))
    section = expand_preset({"preset": "eagle2.5-8b", "hf": str(file)})
    eagle = from_dict(ModelSection, section).validate()
    assert (eagle.text.hidden_size, eagle.text.tie_word_embeddings, eagle.text.head_dim) == (896, True, 64)
    assert eagle.vision == preset("eagle2.5-8b").vision
    # Its tokenizer is another: the image token's id is the data's, or what the section itself says.
    assert eagle.with_data(vocab_size=151936, image_token_index=151671).image_token_index == 151671
    assert expand_preset({"hf": str(file), "image_token_index": 5})["image_token_index"] == 5
    for broken, message in [
        ({**qwen, "model_type": "llama"}, "has model_type 'llama'"),
        ({k: v for k, v in qwen.items() if k != "hidden_size"}, "hidden_size is missing"),
        ({**qwen, "rope_scaling": {"type": "linear"}}, "rope_scaling is"),
    ]:
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=message):
            expand_preset({"hf": str(file)})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vision": {"image_size": 60}}, "vision.image_size is 60: must be a multiple of 16 .patch_size."),
        ({"vision": {"image_size": 48}}, "pixel shuffle"),
        ({"text": {"num_key_value_heads": 3}}, "num_key_value_heads"),
        (
            {"downsample_ratio": 0.3},
            "downsample_ratio is 0.3: must be 1 divided by a whole number",
        ),
    ],
)
def test_impossible_sizes_name_the_rule(section, message):
    with pytest.raises(UserError, match=message):
        from_dict(ModelSection, section).validate()


@pytest.mark.parametrize(
    ("key", "value"), [("select_layer", -2), ("mlp_connector_layers", 1), ("model_type", "llava")]
)
def test_an_unsupported_hf_config_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key} is {value!r}"):
        EagleConfig.from_hf({**preset("eagle2.5-8b").complete().to_hf(), key: value})


def test_data_of_another_tokenizer_is_refused():
    eagle = tiny_model()
    assert eagle.with_data(vocab_size=500, image_token_index=IMAGE_TOKEN) == eagle
    with pytest.raises(UserError, match="another tokenizer"):
        eagle.with_data(vocab_size=500, image_token_index=9)
    with pytest.raises(UserError, match="another tokenizer"):
        eagle.with_data(vocab_size=505, image_token_index=IMAGE_TOKEN)


def test_pixel_shuffle_folds_squares():
    patches = torch.arange(16).reshape(1, 16, 1)  # a 4 x 4 grid, row-major
    assert pixel_shuffle(patches, 2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def _logits(
    ids: torch.Tensor, bounds: list[int], tiles: int, size: int, pixel: float = 1.0
) -> torch.Tensor | str:
    eagle = tiny_model()
    cpu = torch.device("cpu")
    with model_parallel(ParallelConfig()) as mesh:
        [model] = build_model(eagle, mesh, cpu)
        initialize_parameters([model], seed=0)
        positions = torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])
        pixels = torch.full((tiles, 3, size, size), pixel)
        try:
            inputs = make_input(
                eagle,
                mesh,
                cpu,
                input_ids=ids,
                position_ids=positions,
                document_bounds=bounds,
                pixel_values=pixels,
                targets=None,
            )
            return model(inputs).detach()
        except UserError as error:
            return str(error)


def test_packed_samples_do_not_see_each_other_and_equal_themselves_alone():
    first, other, second = (torch.randint(8, 500, (n,)) for n in (10, 10, 12))
    second[3:7] = IMAGE_TOKEN
    [alone] = launch(_logits, 1, second, [0, 12], 1, 64)
    for neighbour in (first, other):
        [packed] = launch(_logits, 1, torch.cat([neighbour, second]), [0, 10, 22], 1, 64)
        torch.testing.assert_close(packed[:, 10:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tiles", "size", "pixel", "message"),
    [
        (1, 64, float("nan"), "NaN"),
        (2, 64, 1.0, "4 image tokens (id 7) but 2 tiles x 4 = 8 image features"),
        (1, 32, 1.0, "tiles are 32 x 32 pixels"),
    ],
)
def test_text_and_tiles_must_match(tiles, size, pixel, message):
    ids = torch.full((8,), 20)
    ids[2:6] = IMAGE_TOKEN
    [found] = launch(_logits, 1, ids, [0, 8], tiles, size, pixel)
    assert message in found


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"sequence_parallel": True}, "needs tensor_model_parallel_size > 1"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size > 1"),
        ({"tensor_model_parallel_size": 3}, "start a multiple of 3 processes"),
        (
            {"context_parallel_size": 4, "ulysses_parallel_size": 3},
            "3 does not divide context_parallel_size 4",
        ),
        (
            {"context_parallel_size": 8, "ring_node_size": 2},
            "ring_node_size 2 is of a ring and context_parallel_comm is auto: set that to ring, or",
        ),
        (
            {"context_parallel_size": 8, "ring_node_size": 3, "context_parallel_comm": "ring"},
            r"3 does not divide the 8 ranks that .* \(.* 8 / ulysses_parallel_size 1\): the nearest is 2",
        ),
        (
            {"context_parallel_size": 8, "ulysses_parallel_size": 2, "context_parallel_comm": "a2a"},
            "a2a divides heads over all 8 .* and ulysses_parallel_size is 2: set it to 8, or",
        ),
        (
            {"context_parallel_size": 8, "context_parallel_comm": "a2a+p2p"},
            "a2a.p2p divides heads over some of the 8 .* ulysses_parallel_size is 1: choose a divisor",
        ),
    ],
)
def test_impossible_layouts_name_the_rule(layout, message):
    with pytest.raises(UserError, match=message):
        ParallelConfig(**layout).data_parallel_size(8)


def test_megatrons_words_are_other_names():
    """What a file says stays; what is done follows this project's word."""
    words = {"p2p": "ring", "all_gather": "gather", "a2a": "auto", "a2a+p2p": "ring"}
    for theirs, ours in words.items():
        ulysses = 2 if theirs == "a2a+p2p" else 1
        layout = ParallelConfig(
            context_parallel_size=8, context_parallel_comm=theirs, ulysses_parallel_size=ulysses
        )
        layout.data_parallel_size(8)
        assert (layout.context_parallel_comm, layout.key_comm) == (theirs, ours)
        assert layout.ulysses_parallel_size == (8 if theirs == "a2a" else ulysses)


def _letters(layout: str) -> dict:
    return {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": layout}


@pytest.mark.parametrize(
    ("layout", "more", "message"),
    [
        ("E|tm|t|L", {}, "'m' stands for nothing of this model, which has E, t and L"),
        ("E|tt|L", {}, "3 parts are no multiple of pipeline_model_parallel_size 4"),
        (
            "Et|t|t|tL",
            {"virtual_pipeline_model_parallel_size": 2},
            "4 parts make 1 virtual stages of 4, .* is 2: leave it out",
        ),
    ],
)
def test_letters_that_are_no_layout(layout, more, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**_letters(layout), **more)


@pytest.mark.parametrize(
    ("parallel", "stages"),
    [
        (_letters("E|(tt|)*6L"), [[0, 2], [2, 2], [2, 2], [2, 0]]),
        (_letters("Et,t|t*3|t*3|t*4,L"), [[2], [3], [3], [4]]),
        ({"pipeline_model_parallel_size": 4, "num_layers_in_last_pipeline_stage": 3}, [[3], [3], [3], [3]]),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 2}, [[10], [2]]),
    ],
)
def test_layers_of_every_stage(parallel, stages):
    assert ParallelConfig(**parallel).stage_layers(12) == stages


@pytest.mark.parametrize(
    ("layout", "length", "message"),
    [
        ({"tensor_model_parallel_size": 8}, 128, "8 does not divide the 28 query heads .*: choose 1, 2 or 4"),
        ({"pipeline_model_parallel_size": 3}, 128, "28 language layers .* 3 equal stages: choose"),
        (
            {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 5},
            128,
            "5 of 28 .*: choose 1, 4, 7, 10",
        ),
        (
            {"pipeline_model_parallel_size": 4, "num_layers_in_last_pipeline_stage": 5},
            128,
            "last_pipeline_stage 5 of 28 .* leaves no equal shares for 3 .*: choose 1, 4, 7, 10",
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_layers_in_first_pipeline_stage": 5,
                "num_layers_in_last_pipeline_stage": 4,
            },
            128,
            "last_pipeline_stage 4 of 28 .* beside num_layers_in_first_pipeline_stage 5 .*: choose 1, 3, 5",
        ),
        (
            _letters("E|(tttttttttt|)*2t*7L"),
            128,
            r"'E\|\(.* has 27 layers \(t\) and the language model has 28",
        ),
        (_letters("Et|t*26|tL|"), 128, r"the embedding \(E\) stands first and the loss \(L\) last"),
        (_letters("Et*14||t*14|L"), 128, "part 2 is empty"),
        (_letters("E|t*28|t|L"), 128, "has 29 layers"),
        (
            _letters("Et*7|t*7|t*7|t*7L") | {"num_layers_in_first_pipeline_stage": 7},
            128,
            "says what parallel.num_layers_in_first_pipeline_stage says: leave one out",
        ),
        ({"context_parallel_size": 3}, 128, "data.length 128 .* multiple of 3"),
        (
            {"context_parallel_size": 3, "context_parallel_layout": "zigzag"},
            129,
            r"129 .* multiple of 6 .* \(zigzag\): the nearest is 1(26|32)",
        ),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 126, "multiple of 4"),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 12, "ulysses_parallel_size": 3},
            132,
            r"3 divides neither the 2 KV heads .* \(4 over 2\) nor, .* 14 .*: choose 1, 2, 4, 6 or 12;",
        ),
        (
            {
                "context_parallel_size": 4,
                "context_parallel_layout": "balanced",
                "context_parallel_chunk_size": 64,
            },
            128,
            r"multiple of 256 .* \(balanced, chunks of 64\): the nearest is 256",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_8b_model_name_the_rule(layout, length, message):
    with pytest.raises(UserError, match=message):
        check_layout(preset("eagle2.5-8b").complete(), ParallelConfig(**layout), length)


def test_layouts_that_fit_the_8b_model():
    for tp in (1, 2, 4):
        parallel = ParallelConfig(tp, sequence_parallel=tp > 1, pipeline_model_parallel_size=4)
        check_layout(preset("eagle2.5-8b").complete(), parallel, 32768)

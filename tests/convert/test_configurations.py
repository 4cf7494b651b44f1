"""What configuration files say reaches training and exports as transformers reads it, or is refused."""

import copy
import json
import re
import shutil
from dataclasses import fields

import pytest
from transformers import AutoConfig, AutoProcessor, PretrainedConfig, Qwen2Config, SiglipVisionConfig

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.checkpoint.hf_folder import add_frames, add_tiling
from megatron_eagle.convert.export_files import write_processor
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.hf_metadata import HfMetadata
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
from megatron_eagle.model.presets import EagleConfig, ModelSection, TextConfig, VisionConfig, preset

# Whatever a configuration says is a size that the model has, refused if it is another, or without effect.
REFUSED = {
    "hidden_act": "gelu",
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
    "head_dim": 8,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
WITHOUT_EFFECT = {
    "attention_dropout": "off outside of training",
    "initializer_range": "weights are given",
    "use_cache": "speed",
    "sliding_window": "only with use_sliding_window",
    "max_window_layers": "only with use_sliding_window",
    "vision_use_head": "the features come from before the pooling head",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "generation_config.json says them"),
}
QWEN = {
    name: getattr(preset("eagle2.5-8b").text, name)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
} | {"num_key_value_heads": 4, "vocab_size": 9}


@pytest.mark.parametrize(("ours", "theirs"), [(TextConfig, Qwen2Config), (VisionConfig, SiglipVisionConfig)])
def test_nothing_in_a_configuration_is_overlooked(ours, theirs):
    known = {field.name for field in fields(ours)} | REFUSED.keys() | WITHOUT_EFFECT.keys()
    assert theirs().to_dict().keys() - PretrainedConfig().to_dict().keys() <= known


@pytest.mark.parametrize("name", REFUSED)
def test_another_architecture_is_refused(name):
    with pytest.raises(UserError, match=f"config.json: {name.replace('parameters', 'type')} is"):
        TextConfig.from_hf({**QWEN, name: REFUSED[name]})


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_theta": 5e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_theta": 5e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    ],
)
def test_what_a_configuration_leaves_out_is_transformers_default(said):
    ours, theirs = TextConfig.from_hf({**QWEN, **said}), Qwen2Config(**copy.deepcopy({**QWEN, **said}))
    for name in (field.name for field in fields(ours)):
        value = theirs.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(theirs, name)
        assert getattr(ours, name) == value, name


def test_two_thetas_are_refused():
    with pytest.raises(UserError, match="rope_theta is 1000000.0 and rope_parameters.rope_theta 10000.0"):
        TextConfig.from_hf({**QWEN, "rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}})


def test_pixels_of_another_scale_are_refused(broken, tmp_path):
    (broken / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.48, 0.46, 0.41]}))
    with pytest.raises(UserError, match="preprocessor_config.json: image_mean is"):
        import_hf(broken, tmp_path / "checkpoint")


def test_an_export_has_the_trained_theta_in_every_spelling(checkpoint, tmp_path):
    """transformers 5 takes what the source's `rope_parameters` say, whatever stands beside them."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    assert "rope_parameters" in (tmp_path / "checkpoint" / "hf" / "config.json").read_text()
    for run in (tmp_path / "checkpoint").glob("iter_*/run.yaml"):
        run.write_text(re.sub("rope_theta: .*", "rope_theta: 5.0e+6", run.read_text()))
    export_hf(tmp_path / "checkpoint", tmp_path / "out", verify=False)
    assert read_model_config(tmp_path / "checkpoint").text.rope_theta == 5e6
    text = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).text_config
    assert text.rope_parameters == {"rope_type": "default", "rope_theta": 5e6}


def test_an_export_cuts_pictures_as_the_data_were_cut(checkpoint, tmp_path):
    """Whatever the source's processor did: training knows thumbnails and grids from one tile on alone."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "hf" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"use_thumbnail": False, "min_dynamic_tiles": 2})
    )
    add_tiling(config.parent, {"max_tiles": 4, "tiling": "aspect"}, fresh=False)
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    settings, served = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for name in ("preprocessor_config", "config")
    )
    expected = {"use_thumbnail": True, "min_dynamic_tiles": 1, "max_dynamic_tiles": 6}
    assert settings.items() >= {**expected, "tiling": "aspect"}.items()
    assert served.items() >= {**expected, "min_dynamic_patch": 1, "max_dynamic_patch": 6}.items()
    model = read_model_config(tmp_path / "checkpoint")
    # More tiles than the source's are what the model is trained with now; fewer only of fresh weights.
    for data, fresh, limit in ((48, False, 48), (9, False, 48), (9, True, 9)):
        add_tiling(config.parent, {"max_tiles": data, "tiling": "aspect"}, fresh=fresh)
        write_processor(tmp_path / "out", model, HfMetadata(tmp_path / "checkpoint"), None)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["max_dynamic_patch"] == limit


def test_an_export_shows_as_many_frames_as_the_data(checkpoint, exported, tmp_path):
    """The processor's 256 unless data showed more; what an export says stays through another import."""
    assert json.loads((exported / "processor_config.json").read_text())["max_frames"] == 256
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    for data, fresh, limit in ((64, False, 256), (512, False, 512), (64, False, 512), (64, True, 64)):
        add_frames(tmp_path / "checkpoint" / "hf", data, fresh=fresh)
        export_hf(tmp_path / "checkpoint", tmp_path / "out", verify=False)
        processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert processor.max_frames == limit
    import_hf(tmp_path / "out", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "last")
    assert json.loads((tmp_path / "last" / "processor_config.json").read_text())["max_frames"] == 64


@pytest.mark.parametrize("k", range(1, 50))
def test_every_ratio_of_pixel_shuffle_means_the_same(k):
    sizes = {"image_size": 2 * k, "patch_size": 1, "hidden_size": 1152}
    ours = EagleConfig(
        VisionConfig(**sizes), text=TextConfig(vocab_size=9), image_token_index=8, downsample_ratio=1 / k
    ).validate()
    theirs = Eagle2_5_VLConfig(vision_config=sizes, downsample_ratio=1 / k)
    assert ours.tokens_per_tile == theirs.tokens_per_tile == 4
    assert ours.shuffle_factor == theirs.shuffle_factor == k


def test_a_ratio_that_the_two_sides_would_round_apart_is_refused():
    with pytest.raises(UserError, match="downsample_ratio is 0.3333: must be 1 divided by a whole number"):
        ModelSection(downsample_ratio=0.3333).validate()

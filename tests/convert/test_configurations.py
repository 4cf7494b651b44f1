"""What configuration files say reaches training and exports as transformers reads it, or is refused."""

import copy
import json
import re
import shutil
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from transformers import (
    AutoConfig,
    AutoProcessor,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.checkpoint.hf_folder import add_frames, add_tiling
from megatron_eagle.convert.export_files import write_processor
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.hf_metadata import HfMetadata
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
from megatron_eagle.model.families import FAMILIES
from megatron_eagle.model.presets import EagleConfig, ModelSection, VisionConfig, preset
from megatron_eagle.model.text import ExpertsConfig, TextConfig, TextSection
from megatron_eagle.model.yarn import YarnConfig

# Whatever a configuration says is a size that the model has, refused if it is another, or without effect.
REFUSED = {
    "hidden_act": "gelu",
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6, "factor": 4.0},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "partial_rotary_factor": 0.5,
}
OF_FAMILY = {
    "qwen2": {"head_dim": 8},
    "qwen3": {"attention_bias": True},
    "qwen3_moe": {
        "attention_bias": True,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 64,
    },
}
WITHOUT_EFFECT = {
    "attention_dropout": "off outside of training",
    "initializer_range": "weights are given",
    "use_cache": "speed",
    "sliding_window": "only with use_sliding_window",
    "max_window_layers": "only with use_sliding_window",
    "output_router_logits": "what a forward returns besides",
    "vision_use_head": "the features come from before the pooling head",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "generation_config.json says them"),
}
QWEN = {
    name: getattr(preset("eagle2.5-8b").text, name)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
} | {"num_key_value_heads": 4, "vocab_size": 9}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
THEIRS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}


def of_family(name: str) -> dict:
    return {**QWEN, "model_type": name, **(EXPERTS if FAMILIES[name].experts else {})}


@pytest.mark.parametrize(
    ("ours", "theirs"), [*((TextConfig, c) for c in THEIRS.values()), (VisionConfig, SiglipVisionConfig)]
)
def test_nothing_in_a_configuration_is_overlooked(ours, theirs):
    names = {field.name for field in (*fields(ours), *fields(ExpertsConfig))}
    refused = {name for family in OF_FAMILY.values() for name in family}
    names.add("num_local_experts")  # how transformers 5 saves num_experts
    known = names | REFUSED.keys() | refused | WITHOUT_EFFECT.keys()
    assert theirs().to_dict().keys() - PretrainedConfig().to_dict().keys() <= known


@pytest.mark.parametrize("family", FAMILIES)
def test_another_architecture_is_refused(family):
    for name, value in {**REFUSED, **OF_FAMILY[family]}.items():
        with pytest.raises(
            UserError, match=f"config.json: {name.replace('rope_parameters', 'rope_scaling')} is"
        ):
            TextConfig.from_hf({**of_family(family), name: value})


def test_a_run_files_families_are_those_that_are_described():
    assert get_args(get_type_hints(TextConfig)["model_type"]) == tuple(FAMILIES)
    with pytest.raises(UserError, match="model_type is 'llama': .* must be one of qwen2, qwen3, qwen3_moe"):
        TextConfig.from_hf({**QWEN, "model_type": "llama"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_theta": 5e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rope_theta": 5e6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        {"head_dim": 128},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2, "rope_theta": 1e5, "beta_fast": 40}},
        {"norm_topk_prob": True, "router_aux_loss_coef": 0.25},
    ],
)
def test_what_a_configuration_leaves_out_is_transformers_default(family, said):
    hf = {**of_family(family), **said}
    ours, theirs = TextConfig.from_hf(hf), THEIRS[family](**copy.deepcopy(hf))
    assert_same(ours, theirs)
    again = THEIRS[family](**copy.deepcopy(ours.to_hf()))  # what we write is what we were given
    assert_same(ours, again)
    assert TextConfig.from_hf(again.to_dict()) == ours == TextConfig.from_hf(ours.to_hf())


def assert_same(ours: TextConfig, theirs: PretrainedConfig) -> None:
    rope, scaling = theirs.rope_parameters, ours.rope_scaling
    assert ours.rope_theta == rope["rope_theta"]
    assert rope["rope_type"] == ("default" if scaling is None else "yarn")
    for f in () if scaling is None else fields(scaling):
        assert getattr(scaling, f.name) == rope.get(f.name, f.default), f.name
    assert ours.head_dim == (
        getattr(theirs, "head_dim", None) or QWEN["hidden_size"] // QWEN["num_attention_heads"]
    )
    assert (ours.experts is None) == (ours.model_type != "qwen3_moe")
    own = {**vars(ours), **(vars(ours.experts) if ours.experts else {})}
    for name in own.keys() - {"rope_theta", "rope_scaling", "head_dim", "experts", "max_position_embeddings"}:
        assert own[name] == getattr(theirs, name), name
    reach = theirs.max_position_embeddings if scaling is None else scaling.reach
    assert ours.max_position_embeddings == reach


def test_two_scalings_are_refused():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    same = {**QWEN, "rope_scaling": {**yarn, "type": "yarn"}, "rope_parameters": {**yarn, "rope_theta": 1e6}}
    assert TextConfig.from_hf(same).max_position_embeddings == 131072
    with pytest.raises(UserError, match="rope_scaling is .* and rope_parameters .*; leave the wrong one out"):
        TextConfig.from_hf(same | {"rope_scaling": yarn | {"factor": 2.0}})
    with pytest.raises(UserError, match="original_max_position_embeddings is 4096 beside .* and 32768 in it"):
        TextConfig.from_hf({**QWEN, "rope_scaling": yarn, "original_max_position_embeddings": 4096})
    with pytest.raises(UserError, match="rope_scaling is 'yarn': a dictionary of settings is needed"):
        TextConfig.from_hf({**QWEN, "rope_scaling": "yarn"})
    with pytest.raises(UserError, match="config.json: rope_scaling.factor: missing"):
        TextConfig.from_hf({**QWEN, "rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(UserError, match="unknown setting 'config.json: rope_scaling.high_freq"):
        TextConfig.from_hf({**QWEN, "rope_scaling": yarn | {"high_freq_factor": 2.0}})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"head_dim": 8},
            "head_dim is 8: in qwen2 it is 16, hidden_size / num_attention_heads",
        ),
        ({"num_attention_heads": 6}, "hidden_size is 64: must be a multiple of 6"),
        ({"model_type": "qwen3", "head_dim": 7}, "head_dim is 7: must be a multiple of 2"),
        ({"model_type": "qwen3_moe"}, "experts: the family qwen3_moe needs experts"),
        ({"experts": ExpertsConfig(8, 2, 48)}, "experts: the family qwen2 has no experts"),
        (
            {"model_type": "qwen3_moe", "experts": ExpertsConfig(2, 3, 48)},
            "experts.num_experts_per_tok is 3: there are 2 experts",
        ),
        (
            {"rope_scaling": YarnConfig(4, 1024), "max_position_embeddings": 5000},
            "max_position_embeddings is 5000: rope_scaling reaches 4096, its factor 4 times 1024",
        ),
    ],
)
def test_sizes_that_no_family_has_are_refused(section, message):
    with pytest.raises(UserError, match=f"model.text.{message}"):
        ModelSection(text=TextSection(**section)).validate()


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

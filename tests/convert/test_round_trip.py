"""Import and export: bit-equal, in the source's shards and types; bad folders are refused before anything
is written."""

import json
import runpy
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, AutoTokenizer

from megatron_eagle.checkpoint import save_checkpoint
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.shards import HF_INDEX
from megatron_eagle.convert.to_hf import RECORD, export_hf
from megatron_eagle.convert.whole_model import whole_model
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.presets import preset
from tests.convert.hf_folder import (
    SPARE_ROWS,
    assert_same_weights,
    read_weights,
    rewrite_weights,
    write_hf_folder,
    write_tokenizer,
)
from tests.convert.use_export import AUTO_CLASSES, load_model
from tests.paths import REPO


def test_round_trip_is_bit_equal(source, exported):
    assert_same_weights(source, exported)
    assert not (exported / HF_INDEX).exists()  # the source has none


LANGUAGE_MODELS = {
    "qwen2": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    "qwen3": {"head_dim": 20},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_every_language_model_comes_back(family, tmp_path):
    """Weights bit by bit, the configuration as transformers reads it, and the answers of the remote code."""
    text = {"model_type": family, **LANGUAGE_MODELS[family]}
    source = write_hf_folder(tmp_path / "hf", text=text)
    config = import_hf(source, tmp_path / "checkpoint")
    assert (config.text.model_type, config.text.experts is not None) == (family, family == "qwen3_moe")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_weights(source, tmp_path / "out")
    ours, theirs = (
        load(folder) for load, folder in ((load_model, tmp_path / "out"), (of_this_checkout, source))
    )
    assert ours.config.text_config.to_dict() == theirs.config.text_config.to_dict() | {
        "max_position_embeddings": config.text.max_position_embeddings
    }
    ids = torch.tensor([[1, 2, *[config.image_token_index] * 4, 3, 4]])
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        found = [model(input_ids=ids, pixel_values=pixels).logits for model in (ours, theirs)]
    assert torch.equal(*found) and found[0].std() > 0.01


def of_this_checkout(folder):
    return Eagle2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def test_shards_and_mixed_types_are_kept(broken, tmp_path):
    kinds = [torch.bfloat16, torch.float16, torch.float32]

    def mixed(tensors):
        return {name: tensors[name].to(kinds[i % 3]) for i, name in enumerate(sorted(tensors))}

    rewrite_weights(broken, mixed, shard_bytes=20_000)
    import_hf(broken, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_weights(broken, tmp_path / "out")
    index = json.loads((broken / HF_INDEX).read_text())
    assert json.loads((tmp_path / "out" / HF_INDEX).read_text()) == index
    assert len(set(index["weight_map"].values())) > 3


def test_the_tiling_of_the_data_reaches_the_exported_processor(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    path = copy / "hf" / "preprocessor_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | {"tiling": "aspect", "max_dynamic_tiles": 12}))
    export_hf(copy, tmp_path / "out", verify=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    side = processor.image_processor.size["height"]
    tiles = processor.image_processor(images=[Image.new("RGB", (1000 * side // 448, 700 * side // 448))])
    assert len(tiles["pixel_values"]) == 3 * 2 + 1  # IAP: 4 x 3 and the thumbnail


def test_bf16_stays_bf16(broken, tmp_path):
    rewrite_weights(broken, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    import_hf(broken, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_weights(broken, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_is_the_sources_with_every_spelling(source, exported):
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (exported, source))
    assert ours["loss_version"] == theirs["loss_version"] == "of-the-source"
    for kind in ("tiles", "patch"):
        assert (ours[f"min_dynamic_{kind}"], ours[f"max_dynamic_{kind}"]) == (1, 6)
    assert ours["auto_map"].keys() == {"AutoConfig", "AutoModelForVision2Seq", *AUTO_CLASSES}
    assert ours["architectures"] == ["Eagle2_5_VLForConditionalGeneration"]
    assert ours["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert ours["text_config"]["rope_theta"] == 3e6  # transformers 4.51 reads no rope_parameters
    assert ours["vision_config"]["vision_use_head"] is True
    assert (ours["select_layer"], ours["mlp_connector_layers"], ours["force_image_size"]) == (-1, 2, 64)
    assert not any(key.startswith("_") for key in ours)


def test_no_other_length_of_the_source_is_below_its_positions(broken, tmp_path):
    """vLLM takes the least of several names in text_config; transformers warns of the tokenizer's."""
    config = json.loads((broken / "config.json").read_text())
    text = config["text_config"] | {"seq_length": 100, "model_max_length": 8000, "max_seq_len": None}
    _edit_config(broken, text_config=text)
    tokenizer = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 100}))
    import_hf(broken, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (found["max_position_embeddings"], found["seq_length"]) == (4096, 4096)
    assert (found["model_max_length"], found["max_seq_len"]) == (8000, None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 4096


def test_a_tokenizer_saved_by_transformers_5_is_read_by_4(broken, tmp_path):
    """Which knows no TokenizersBackend, and wants `extra_special_tokens` with names."""
    tokenizer = AutoTokenizer.from_pretrained(broken)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
    tokenizer.save_pretrained(broken)
    saved = json.loads((broken / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend" and "extra_special_tokens" in saved
    import_hf(broken, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == saved["extra_special_tokens"]
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & found.keys()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.extra_special_tokens == tokenizer.extra_special_tokens


def test_generation_stops_at_im_end_by_name(source, exported):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ids["<|im_end|>"]
    assert generation["pad_token_id"] == ids["<|endoftext|>"]
    assert (exported / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_export_again_replaces_only_its_own_files(checkpoint, exported, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors").write_bytes(b"old")
    export_hf(checkpoint, out, max_tiles=4)
    assert_same_weights(exported, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "preprocessor_config.json").read_text())["max_dynamic_tiles"] == 4
    assert json.loads((out / "config.json").read_text())["max_dynamic_patch"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # no half-made folder is left


def test_somebody_elses_folder_is_not_written_to(checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(UserError, match="exists and is no earlier export"):
        export_hf(checkpoint, tmp_path)
    assert not (tmp_path / RECORD).exists()


def test_a_model_from_scratch_exports_without_a_source(tmp_path):
    """No C/hf but a tokenizer: no pooling head, the default shard, the type it was trained in."""
    root = tmp_path / "checkpoint"
    tokenizer = write_tokenizer(root / "hf")
    image_token = tokenizer.token_to_id("<IMG_CONTEXT>")
    rows = tokenizer.get_vocab_size() + SPARE_ROWS
    eagle = preset("tiny").with_data(vocab_size=rows, image_token_index=image_token)
    with whole_model(eagle, torch.float32) as (model, _, _):
        initialize_parameters([model], seed=1)
        run = {"model": eagle, "training": {"precision": "bf16"}}
        save_checkpoint(root, models=[model], run_config=run, iteration=7)
    export_hf(root, tmp_path / "out")
    weights = read_weights(tmp_path / "out")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["language_model.lm_head.weight"].shape == (rows, 64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["vision_use_head"] is False  # or transformers would make a random one
    assert json.loads((tmp_path / "out" / RECORD).read_text())["iteration"] == 7


def test_import_without_a_pooling_head(tmp_path):
    source = write_hf_folder(tmp_path / "hf", vision={"vision_use_head": False})
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert_same_weights(source, tmp_path / "out")


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _without_bias(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "mlp1.1.bias"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: _edit_config(f, model_type="llava"), "model_type is 'llava'"),
        (lambda f: _edit_config(f, select_layer=-2), "select_layer is -2"),
        (lambda f: _edit_config(f, mlp_connector_layers=1), "mlp_connector_layers is 1"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights here"),
        (lambda f: rewrite_weights(f, _without_bias), "missing .1. mlp1.1.bias"),
    ],
)
def test_a_bad_source_is_refused_before_anything_is_written(broken, tmp_path, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message):
        import_hf(broken, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_import_does_not_overwrite(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        import_hf(source, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        import_hf(tmp_path / "nowhere", tmp_path / "checkpoint")


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    definition = json.loads((copy / "hf" / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        if token["content"] == "<img>":
            token["content"] = "<picture>"
    (copy / "hf" / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="has no token <img>"):
        export_hf(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_tensors_that_pass_through_are_named(checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    save_file({"other": torch.zeros(1)}, copy / "hf" / "carried.safetensors")
    with pytest.raises(UserError, match="unexpected .1. other"):
        export_hf(copy, tmp_path / "out")
    (copy / "hf" / "carried.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="carried.safetensors: truncated"):
        export_hf(copy, tmp_path / "out")


def test_the_tool_says_one_line(tmp_path, capsys, monkeypatch):
    arguments = ["convert_hf.py", "export", "--checkpoint", str(tmp_path), "--hf", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPO / "tools" / "convert_hf.py"), run_name="__main__")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path}: not a checkpoint") and message.count("\n") == 1

"""Tensors that repeat something are compared with it and left out; other ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eagle.convert.compare import differences, open_tensors
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from tests.convert.hf_folder import assert_same_weights, read_weights, rewrite_weights, write_hf_folder

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
POSITIONS = "vision_model.vision_model.embeddings.position_ids"
FREQUENCIES = "language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"
ROTARY_PAIRS, THETA = 6, 3e6


def tables(theta=THETA, dtype=torch.float32):
    frequencies = (theta ** -(torch.arange(ROTARY_PAIRS) / ROTARY_PAIRS)).to(dtype)
    both = {FREQUENCIES.format(layer): frequencies.clone() for layer in range(2)}
    return both | {POSITIONS: torch.arange(16)[None]}


def add(folder, tensors):
    """By the library, for ours writes no whole numbers."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.fixture
def tied(tmp_path):
    """A folder as its tools wrote it: tied, and with the output layer all the same."""
    folder = write_hf_folder(tmp_path / "tied", text={"tie_word_embeddings": True})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    rewrite_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if k != HEAD})
    return folder


def imported(folder, tmp_path):
    import_hf(folder, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_left_out(source, broken, tmp_path, dtype):
    add(broken, tables(dtype=dtype))
    out = imported(broken, tmp_path)
    assert_same_weights(out, source)
    assert not list(differences(open_tensors(broken), open_tensors(out)))


def test_a_tied_output_layer_is_left_out(tied, tmp_path):
    before = read_weights(tied)
    rewrite_weights(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    after = read_weights(imported(tied, tmp_path))
    assert before.keys() == after.keys() and HEAD not in after
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_output_layer_is_refused(tied, tmp_path):
    rewrite_weights(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + 1})
    with pytest.raises(UserError, match=f"{HEAD} is not the embedding, which is tied to it"):
        imported(tied, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (tables(theta=1e6), "is not those of rope_theta 3e\\+06"),
        (tables() | {POSITIONS: torch.arange(1, 17)[None]}, f"{POSITIONS} is not 0, 1, 2"),
        ({"vision_model.extra": torch.arange(3)}, "vision_model.extra is I64; supported"),
    ],
)
def test_another_table_is_refused(broken, tmp_path, wrong, message):
    add(broken, wrong)
    with pytest.raises(UserError, match=message):
        imported(broken, tmp_path)


def test_the_older_name_of_the_language_model(source, broken, tmp_path):
    config = json.loads((broken / "config.json").read_text())
    config["llm_config"] = config.pop("text_config")
    config["vision_config"]["drop_path_rate"] = 0.1
    (broken / "config.json").write_text(json.dumps(config))
    out = imported(broken, tmp_path)
    assert_same_weights(out, source)
    written = json.loads((out / "config.json").read_text())
    assert "llm_config" not in written
    assert written["text_config"]["rope_theta"] == THETA


@pytest.mark.slow
def test_the_published_1b_at_cut_depth(tmp_path):
    """Its widths, vocabulary and tied output layer; one layer of 27 and of 24."""
    import dataclasses

    from megatron_eagle.model.presets import preset

    section = preset("eagle2.5-1b")
    vision, text = (dataclasses.asdict(part) for part in (section.vision, section.text))
    for part in (vision, text):
        part["num_hidden_layers"] = 1
    source = write_hf_folder(tmp_path / "source", vision=vision, text=text)
    rewrite_weights(source, lambda tensors: {k: v.bfloat16() for k, v in tensors.items() if k != HEAD})
    out = imported(source, tmp_path)
    assert_same_weights(source, out)
    assert read_weights(out)[EMBEDDING].shape == (151_674, 896)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True

"""A language model and a SigLIP encoder become a checkpoint: every weight in its place, new ones as said."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.convert.compare import open_tensors
from megatron_eagle.convert.from_parts import Parts, import_parts
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.convert.whole_model import whole_model
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.inference import logits
from megatron_eagle.model.initialization import initialize_parameters
from tests.convert.hf_folder import read_weights, write_tokenizer
from tests.data.helpers import SPECIAL
from tests.paths import REPO

SPARE = 7  # rows of the language model beyond its tokenizer, as Qwen2.5 has
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
EAGLE_ONLY = SPECIAL[3:]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return write_parts(tmp_path_factory.mktemp("parts"))


def write_parts(root: Path) -> Parts:
    """A Qwen2.5 and a SigLIP folder of random weights, and a tokenizer with the image tokens."""
    write_tokenizer(root / "tokenizer")
    definition = json.loads((root / "tokenizer" / "tokenizer.json").read_text())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] not in EAGLE_ONLY]
    (root / "language").mkdir()
    (root / "language" / "tokenizer.json").write_text(json.dumps(definition))
    known = Tokenizer.from_file(str(root / "language" / "tokenizer.json")).get_vocab_size()
    torch.manual_seed(1)
    language = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=known + SPARE,
        )
    )
    language.save_pretrained(root / "language")
    encoder = {"image_size": 48, "patch_size": 16, "hidden_size": 32, "intermediate_size": 56}
    encoder |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 64}, vision_config=encoder)).save_pretrained(
        root / "vision"
    )
    return Parts(root / "language", root / "vision", root / "tokenizer", tile_size=64)


@pytest.fixture(scope="module")
def start(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    import_parts(parts, folder)
    return folder


def test_weights_of_the_parts_are_kept(parts, start):
    found = open_tensors(start)
    language, vision = read_weights(parts.language), read_weights(parts.vision)
    for name, tensor in language.items():
        if name not in (EMBEDDING, OUTPUT):
            assert torch.equal(found.read(f"language_model.{name}"), tensor), name
    names = [n for n in vision if n.startswith("vision_model.") and "position_embedding" not in n]
    assert len(names) > 20 and any(".head." in name for name in names)
    for name in names:
        assert torch.equal(found.read(f"vision_model.{name}"), vision[name]), name


@pytest.mark.parametrize("name", [EMBEDDING, OUTPUT])
def test_new_tokens_begin_as_the_mean_of_the_known_ones(parts, start, name):
    known = Tokenizer.from_file(str(parts.language / "tokenizer.json")).get_vocab_size()
    old, new = read_weights(parts.language)[name], open_tensors(start).read(f"language_model.{name}")
    assert len(new) == known + len(EAGLE_ONLY)
    assert torch.equal(new[:known], old[:known])
    mean = old[:known].mean(0).expand(len(EAGLE_ONLY), -1)
    torch.testing.assert_close(new[known:], mean)


def test_positions_are_resized_with_the_tile(parts, start, tmp_path):
    name = "vision_model.embeddings.position_embedding.weight"
    old = read_weights(parts.vision)[name]
    grid = old.T.reshape(1, 32, 3, 3)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic").reshape(32, 16).T
    torch.testing.assert_close(open_tensors(start).read(f"vision_model.{name}"), expected)
    same = Parts(parts.language, parts.vision, parts.tokenizer)
    with pytest.raises(UserError, match="multiple of 2"):  # three patches a side cannot be shuffled
        import_parts(same, tmp_path / "c")


def test_the_connector_is_that_of_a_fresh_model(start, parts, tmp_path):
    config, found = read_model_config(start), open_tensors(start)
    with whole_model(config, torch.float32) as (model, _, _):
        initialize_parameters([model], seed=0)
        for number, ours in (("0", "layer_norm"), ("1", "linear_fc1"), ("3", "linear_fc2")):
            for kind in ("weight", "bias"):
                expected = getattr(getattr(model.connector, ours), kind)
                assert torch.equal(found.read(f"mlp1.{number}.{kind}"), expected)
    other = Parts(parts.language, parts.vision, parts.tokenizer, tile_size=64, seed=1)
    import_parts(other, tmp_path / "c")
    assert not torch.equal(open_tensors(tmp_path / "c").read("mlp1.1.weight"), found.read("mlp1.1.weight"))


def test_text_is_answered_as_by_the_language_model(parts, start):
    language = Qwen2ForCausalLM.from_pretrained(parts.language).eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        expected = language(input_ids=ids).logits
    known = expected.shape[-1] - SPARE
    found = logits(start, ids)[..., :known]
    torch.testing.assert_close(found, expected[..., :known], atol=2e-5, rtol=1e-5)


OTHERS = {
    "qwen3": (Qwen3Config, {"head_dim": 20}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 20, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_every_language_model_is_a_part(family, parts, tmp_path):
    """Weights and, where one process can tell, answers; the export's remote code wraps the same model."""
    kind, sizes = OTHERS[family]
    old = Qwen2Config.from_pretrained(parts.language)
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    same += ("num_key_value_heads",)
    torch.manual_seed(2)
    language = AutoModelForCausalLM.from_config(kind(**{n: getattr(old, n) for n in same}, **sizes)).eval()
    language.save_pretrained(tmp_path / "language")
    shutil.copyfile(parts.language / "tokenizer.json", tmp_path / "language" / "tokenizer.json")
    config = import_parts(replace(parts, language=tmp_path / "language"), tmp_path / "start")
    assert (config.text.model_type, config.text.head_dim) == (family, 20)
    export_hf(tmp_path / "start", tmp_path / "hf")
    found, given = read_weights(tmp_path / "hf"), read_weights(tmp_path / "language")
    assert {f"language_model.{name}" for name in given} == {n for n in found if n.startswith("language")}
    for name, tensor in given.items():
        if name not in (EMBEDDING, OUTPUT):
            assert torch.equal(found[f"language_model.{name}"], tensor), name
    ids = torch.arange(5, 40)[None]
    answers = Eagle2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        expected, exported = (model(input_ids=ids).logits for model in (language, answers))
    known = expected.shape[-1] - SPARE
    assert torch.equal(exported[..., :known], expected[..., :known])
    if config.text.experts is None:
        ours = logits(tmp_path / "start", ids)[..., :known]
        torch.testing.assert_close(ours, expected[..., :known], atol=2e-5, rtol=1e-5)


def test_it_exports(start, tmp_path):
    export_hf(start, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == config["force_image_size"] == 64
    assert config["vision_config"]["vision_use_head"] is True


def test_a_encoder_alone_and_tied_embeddings(parts, tmp_path):
    """`siglip_vision_model` instead of `siglip`; a small Qwen2.5 without lm_head."""
    from transformers import SiglipVisionModel

    encoder = SiglipVisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=2,
        vision_use_head=False,
    )
    SiglipVisionModel(encoder).save_pretrained(tmp_path / "vision")
    config = Qwen2Config.from_pretrained(parts.language)
    config.tie_word_embeddings = True
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "language")
    (tmp_path / "language" / "tokenizer.json").write_bytes((parts.language / "tokenizer.json").read_bytes())
    found = import_parts(Parts(tmp_path / "language", tmp_path / "vision", parts.tokenizer), tmp_path / "c")
    assert found.text.tie_word_embeddings and found.vision.image_size == 64
    assert "language_model.lm_head.weight" not in open_tensors(tmp_path / "c").shapes


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_does_not_fit_is_named(parts, tmp_path):
    def attempt(message, **changes):
        folders = {name: getattr(parts, name) for name in ("language", "vision", "tokenizer")}
        with pytest.raises(UserError, match=message) as error:
            import_parts(Parts(**{**folders, "tile_size": 64, **changes}), tmp_path / "c")
        assert "\n" not in str(error.value) and not (tmp_path / "c").exists()

    attempt("no such folder", vision=tmp_path / "nowhere")
    attempt("has no token <img>", tokenizer=parts.language)
    attempt("model_type is 'siglip'", language=parts.vision, tokenizer=parts.tokenizer)
    attempt("model_type is 'qwen2'; a SigLIP encoder", vision=parts.language)
    other = Tokenizer.from_file(str(parts.language / "tokenizer.json"))
    other.add_special_tokens([AddedToken(name, special=True) for name in ("<first>", *EAGLE_ONLY)])
    definition = json.loads(other.to_str())
    vocabulary = definition["model"]["vocab"]
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(definition))
    attempt("must be the language model's own with tokens added", tokenizer=tmp_path / "other")


def test_the_tool(parts, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert_hf.py", "import", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(REPO / "tools" / "convert_hf.py"), run_name="__main__")
        return exit.value.code or 0

    folders = ("--language", parts.language, "--vision", parts.vision, "--tile-size", 64)
    target = ("--checkpoint", tmp_path / "c")
    assert run(*folders, *target) == 2
    assert "name either --hf, or --language, --vision and --tokenizer" in capsys.readouterr().err
    assert run(*folders, "--tokenizer", parts.tokenizer, *target) == 0
    assert "2 language layers, 2 vision layers" in capsys.readouterr().out

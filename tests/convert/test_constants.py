"""Constants that training and what serves the model both have: one list, each compared bit for bit.

"Ours" are the training model and the data path, "theirs" the export in transformers and its processor. What
differs has a name in `DIFFERENT` and in docs/conversion.md. Rotary tables by position: `test_rotary.py`;
whole prompts, pictures and videos: `test_same_as_training.py`; what both have from one file:
`test_one_source.py`.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from eagle_kernels.rope import rope
from megatron_eagle.checkpoint import load_checkpoint, read_model_config
from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.convert.whole_model import whole_model
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.text import template
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.hf_model import media_files as their_media
from megatron_eagle.hf_model import processing_eagle2_5_vl as their_text
from megatron_eagle.hf_model import tiles
from megatron_eagle.hf_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.hf_model.pixel_shuffle import pixel_shuffle
from megatron_eagle.hf_model.prompt import END_OF_TEXT, IM_END, IMG_CONTEXT, IMG_END, IMG_START
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.presets import EagleConfig
from tests.paths import REPO


@dataclass(frozen=True)
class Sides:
    """One model as it trains and as its export serves, in one type."""

    model: EagleModel
    export: Eagle2_5_VLForConditionalGeneration
    dtype: torch.dtype

    @property
    def layer(self):
        return self.model.language_model.decoder.layers[0]

    @property
    def their_layer(self):
        return self.export.language_model.model.layers[0]

    @property
    def encoder_layer(self):
        return self.model.vision_model.encoder.layers[0]

    @property
    def their_encoder(self):
        return getattr(self.export.vision_model, "vision_model", self.export.vision_model)

    @property
    def their_encoder_layer(self):
        return self.their_encoder.encoder.layers[0]

    def random(self, *shape: int) -> Tensor:
        """Values that meet every branch of an activation, the same for both sides."""
        generator = torch.Generator().manual_seed(sum(shape))
        return (torch.randn(shape, generator=generator) * 3).to(self.dtype)


POSITIONS = torch.tensor([0, 1, 2, 31, 4095, 32_768, 131_071, 1_048_576])


def _table(s: Sides):
    pack = PackedSequence(position_ids=POSITIONS, layout=None, exchange=None)
    s.model.language_model.rotary_pos_emb(pack)
    return pack.rotary_table


def _their_table(s: Sides):
    whole = s.export.language_model.model.rotary_emb(s.random(1), POSITIONS[None])
    return [half[0, :, : half.shape[-1] // 2] for half in whole]


def _with_gradient(rotate, x: Tensor):
    y = rotate(x.requires_grad_())
    return y.detach(), torch.autograd.grad(y, x, (y.detach() * 0.7).round(decimals=2))[0]


def _rotated(s: Sides):
    return _with_gradient(lambda x: rope(x, *_table(s)), s.random(8, 3, 12))


def _their_rotated(s: Sides):
    cos, sin = s.export.language_model.model.rotary_emb(s.random(1), POSITIONS[None])

    def rotate(x):
        query, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
        return query[0].transpose(0, 1)

    return _with_gradient(rotate, s.random(8, 3, 12))


def _their_swiglu(s: Sides):
    gate, up = s.random(9, 160).chunk(2, dim=-1)
    return s.their_layer.mlp.act_fn(gate) * up


def _encoder_attention(s: Sides):
    q, k, v = s.random(3, 16, 5, 2, 16)  # patches, tiles, heads, features
    return s.encoder_layer.self_attention.core_attention(q, k, v, None)


def _their_encoder_attention(s: Sides):
    q, k, v = (x.permute(1, 2, 0, 3) for x in s.random(3, 16, 5, 2, 16))
    module = s.their_encoder_layer.self_attn
    out, _ = sdpa_attention_forward(module, q, k, v, None, scaling=module.scale, is_causal=False)
    return out.transpose(0, 1).flatten(2)


def _embedded(module: torch.nn.Module, run, pixels: Tensor) -> Tensor:
    """What `module` gets when `run` is given `pixels`."""
    seen = []
    with module.register_forward_pre_hook(
        lambda _, args, named: seen.append((*args, *named.values())[0]), with_kwargs=True
    ):
        run(pixels)
    return seen[0]


def _choosing(module: torch.nn.Module, x: Tensor) -> Tensor:
    """`module` with linear layers that pick features: no sums, of which each side has its own order."""
    trained = copy.deepcopy(module.state_dict())
    for linear in (m for m in module.modules() if hasattr(m, "weight") and m.weight.dim() == 2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    y = module(x)
    module.load_state_dict(trained)
    return y


def _epsilons(module: torch.nn.Module) -> list[float]:
    """Of all norms, in order."""
    names = ("eps", "variance_epsilon")
    return [getattr(m, name) for m in module.modules() for name in names if hasattr(m, name)]


# What the model computes with: (ours, theirs), in fp32 and in bf16.
MODEL = {
    "rotary inverse frequencies": (
        lambda s: s.model.language_model.rotary_pos_emb.frequencies,
        lambda s: s.export.language_model.model.rotary_emb.inv_freq,
    ),
    "rotary cosines and sines": (_table, _their_table),
    "rotated queries and their gradient": (_rotated, _their_rotated),
    "epsilons of the language norms": (
        lambda s: _epsilons(s.model.language_model),
        lambda s: _epsilons(s.export.language_model),
    ),
    "language norm": (
        lambda s: s.layer.input_layernorm(s.random(9, 48)),
        lambda s: s.their_layer.input_layernorm(s.random(9, 48)),
    ),
    "attention scale": (
        lambda s: s.layer.self_attention.core_attention.core.scale,
        lambda s: s.their_layer.self_attn.scaling,
    ),
    "SwiGLU": (lambda s: s.layer.mlp.activation_func(s.random(9, 160)), _their_swiglu),
    "patches with their positions": (
        lambda s: _embedded(
            s.model.vision_model.encoder, s.model.vision_model, s.random(2, 3, 64, 64)
        ).transpose(0, 1),
        lambda s: _embedded(s.their_encoder.encoder, s.their_encoder, s.random(2, 3, 64, 64)),
    ),
    "epsilons of the vision encoder's norms": (
        lambda s: _epsilons(s.model.vision_model),
        lambda s: _epsilons(s.their_encoder.encoder) + _epsilons(s.their_encoder.post_layernorm),
    ),
    "encoder norm": (
        lambda s: s.encoder_layer.input_layernorm(s.random(9, 32)),
        lambda s: s.their_encoder_layer.layer_norm1(s.random(9, 32)),
    ),
    "encoder attention scale": (
        lambda s: s.encoder_layer.self_attention.core_attention.scale,
        lambda s: s.their_encoder_layer.self_attn.scale,
    ),
    "encoder attention": (_encoder_attention, _their_encoder_attention),
    "encoder GELU": (
        lambda s: s.encoder_layer.mlp.activation_func(s.random(9, 56)),
        lambda s: s.their_encoder_layer.mlp.activation_fn(s.random(9, 56)),
    ),
    "epsilon of the connector's norm": (
        lambda s: _epsilons(s.model.connector),
        lambda s: _epsilons(s.export.mlp1),
    ),
    "connector: pixel shuffle, norm, GELU": (
        lambda s: _choosing(s.model.connector, s.random(2, 16, 32)),
        lambda s: _choosing(s.export.mlp1, pixel_shuffle(s.random(2, 16, 32), 2)).flatten(0, 1),
    ),
}


@dataclass(frozen=True)
class Files:
    """What a run's data were made with, and what its export says."""

    source: Path
    config: EagleConfig
    settings: PreprocessSettings
    export: Path
    processor: object

    def json(self, name: str) -> dict:
        return json.loads((self.export / name).read_text())


def _picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def _special(files: Files) -> dict[str, int]:
    vocabulary = load_tokenizer(files.source)
    return {
        name: vocabulary.token_id(name) for name in (IM_END, END_OF_TEXT, IMG_START, IMG_END, IMG_CONTEXT)
    }


def _their_special(files: Files) -> dict[str, int]:
    p, generation = files.processor, files.json("generation_config.json")
    tokens = (p.image_start_token, p.image_end_token, p.image_token)
    ids = dict(zip(tokens, p.tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    # An answer ends where training ended it; what follows is padding.
    return {IM_END: generation["eos_token_id"], END_OF_TEXT: generation["pad_token_id"], **ids}


def _their_prompt() -> str:
    return their_text.own_template(thinks=False).split(r"system\n")[1].split(IM_END)[0]


# What pictures and text become: (ours, theirs).
DATA = {
    "side of a tile": (
        lambda f: [f.settings.sampling.tile_size] * 4,
        lambda f: [
            *f.json("preprocessor_config.json")["size"].values(),
            f.json("config.json")["force_image_size"],
            f.json("config.json")["vision_config"]["image_size"],
        ],
    ),
    "tokens of a tile": (
        lambda f: [f.settings.tokens_per_tile, f.config.tokens_per_tile],
        lambda f: [f.processor.tokens_per_tile, Eagle2_5_VLConfig(**f.json("config.json")).tokens_per_tile],
    ),
    "normalisation of every value": (
        lambda f: tiles.normalize(torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)),
        lambda f: f.processor.image_processor.normalize(
            torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
        ),
    ),
    "tiles and thumbnail": (
        lambda f: [tiles.image_tiles(_picture(190, 111), grid, 64) for grid in ((3, 2), (1, 1))],
        lambda f: [
            f.processor.image_processor.tile_image(_picture(190, 111), max_dynamic_tiles=n) for n in (6, 1)
        ],
    ),
    "most tiles, unless told": (
        lambda f: SamplingSettings().max_tiles,
        lambda f: Eagle2_5_VLConfig().max_dynamic_tiles,
    ),
    "frames per second, unless told": (lambda f: SamplingSettings().fps, lambda f: their_media.DEFAULT_FPS),
    "special tokens": (_special, _their_special),
    "system prompt of the hf template": (
        lambda f: template._SYSTEM_PROMPT["hf"],
        lambda f: _their_prompt(),
    ),
    "image token of the model": (
        lambda f: [
            f.config.image_token_index,
            template.Template(load_tokenizer(f.source), "hf", 4).image_token_id,
        ],
        lambda f: [f.json("config.json")["image_token_index"]] * 2,
    ),
}

# Not equal, each for a reason; under the names that docs/conversion.md has for them.
DIFFERENT = {
    # The paper's training text is the default; the released processor's is `--template hf`.
    "text template": (
        lambda f: template._SYSTEM_PROMPT[PreprocessSettings("", (1,)).template],
        lambda f: _their_prompt(),
    ),
    # The paper's numbers for training, the released processor's for answers.
    "frames of a video": (
        lambda f: [SamplingSettings().min_frames, SamplingSettings().max_frames],
        lambda f: [their_media.DEFAULT_MIN_FRAMES, their_media.DEFAULT_MAX_FRAMES],
    ),
}


def _with_bias(s: Sides) -> Tensor:
    y, bias = s.encoder_layer.mlp.linear_fc1(s.random(9, 32))
    return y + bias


def _attention(s: Sides) -> Tensor:
    segments = (Segment(0, 9, 0, 9),)
    core = s.layer.self_attention.core_attention.core
    return core.backend.forward(*s.random(3, 9, 2, 12), segments, core.scale, causal=True)[0]


def _their_attention(s: Sides) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in s.random(3, 9, 2, 12))
    module = s.their_layer.self_attn
    return sdpa_attention_forward(module, q, k, v, None, scaling=module.scaling)[0][0]


# Sums that are rounded elsewhere, in bf16; how far apart the two sides may be, of the largest value.
ROUNDED = {
    # Megatron rounds the product before it adds the bias, `torch.nn.Linear` after.
    "bias of linear layers": (_with_bias, lambda s: s.their_encoder_layer.mlp.fc1(s.random(9, 32)), 2**-7),
    # Every attention kernel has its own.
    "and attention": (_attention, _their_attention, 2**-7),
}


def bits(value) -> object:
    """Something that is equal only if types, shapes and all bits are."""
    if isinstance(value, Tensor):
        value = value.detach()
        return str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return type(value), value.hex() if isinstance(value, float) else value


def test_every_bit_counts():
    one = torch.tensor([1.0])
    others = (torch.nextafter(one, 2 * one), one.double(), one[None], -one * 0, one * 0, 1.0, 1)
    assert len({str(bits(value)) for value in (one, *others)}) == 8
    assert bits(1e-6) != bits(1.0000000000000002e-6) and bits([one]) != bits([one, one])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def sides(request, checkpoint, exported):
    export = Eagle2_5_VLForConditionalGeneration.from_pretrained(exported, dtype=request.param)
    with whole_model(read_model_config(checkpoint), request.param) as (model, _, _), torch.no_grad():
        load_checkpoint(checkpoint, models=[model])
        yield Sides(model.eval(), export.eval(), request.param)


@pytest.fixture(scope="module")
def files(source, checkpoint, exported):
    config = read_model_config(checkpoint)
    sampling = SamplingSettings(tile_size=config.vision.image_size)
    settings = PreprocessSettings(str(source), (4096,), sampling, patch_size=config.vision.patch_size)
    return Files(
        source, config, settings, exported, AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    )


@pytest.mark.parametrize("name", MODEL)
def test_the_model_computes_with_the_exports_bits(sides, name):
    ours, theirs = MODEL[name]
    with torch.enable_grad():
        assert bits(ours(sides)) == bits(theirs(sides))


@pytest.mark.parametrize("name", DATA)
def test_data_are_made_with_the_processors_bits(files, name):
    ours, theirs = DATA[name]
    assert bits(ours(files)) == bits(theirs(files))


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named(files, name):
    ours, theirs = DIFFERENT[name]
    assert bits(ours(files)) != bits(theirs(files))
    assert name in _page()


@pytest.mark.parametrize("name", ROUNDED)
def test_sums_are_rounded_elsewhere_in_bf16(sides, name):
    ours, theirs, limit = ROUNDED[name]
    ours, theirs = ours(sides), theirs(sides)
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if sides.dtype == torch.float32:
        assert apart < 1e-6
    else:
        assert 0 < apart <= limit and name in _page()


def _page() -> str:
    return " ".join((REPO / "docs" / "conversion.md").read_text().split())

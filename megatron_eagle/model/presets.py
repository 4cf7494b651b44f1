"""What an Eagle 2.5 model is: its sizes, in Hugging Face's words, and presets of them."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self

from megatron_eagle.config import from_dict, to_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.families import FAMILIES
from megatron_eagle.model.hf_config import known_fields, missing_keys_named, require
from megatron_eagle.model.text import ExpertsConfig, TextConfig, TextSection
from megatron_eagle.ranges import Range, Ranged


@dataclass
class VisionConfig(Ranged):
    """SigLIP2 encoder at a fixed resolution (HF `SiglipVisionModel`); lengths in pixels and features."""

    image_size: Annotated[int, Range(1, 8192)] = 64  # pixels a side of a tile
    patch_size: Annotated[int, Range(1, 1024)] = 16  # pixels a side of a patch
    hidden_size: Annotated[int, Range(8, 65536)] = 64  # features of a patch
    intermediate_size: Annotated[int, Range(8, 262144)] = 136  # of the MLP
    num_hidden_layers: Annotated[int, Range(1, 1024)] = 2  # depth of the encoder
    num_attention_heads: Annotated[int, Range(1, 1024)] = 4  # which divide the features
    num_channels: Annotated[int, Range(3, 3, why="tiles are RGB")] = 3  # colours of a pixel
    layer_norm_eps: Annotated[float, Range(1e-12, 0.1)] = 1e-6  # of every norm

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "VisionConfig":
        """From a `SiglipVisionModel` configuration.

        Raises:
            UserError: another encoder, or a missing key.
        """
        with missing_keys_named():
            require(hf, model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh")
            return from_dict(cls, known_fields(cls, hf), "config.json: vision_config")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass
class ModelSection(Ranged):
    """A run file's word on Eagle 2.5, before the data are known: SigLIP2 encoder, pixel shuffle, two-layer
    connector, language model. `image_token_index: null` is taken from the data's manifest.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)  # the vision encoder
    text: TextSection = field(default_factory=TextSection)  # the language model
    image_token_index: Annotated[int, Range(0, 2**24)] | None = None
    downsample_ratio: Annotated[float, Range(0.01, 1)] = 0.5  # 1 / patches that pixel shuffle folds, a side
    # Standard deviation of a fresh model's weights (both source models use 0.02).
    initializer_range: Annotated[float, Range(1e-4, 1)] = 0.02

    @property
    def shuffle_factor(self) -> int:
        """Patches that pixel shuffle folds into one token, per side."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: 256 for 448 px at patch 14."""
        return self.vision.num_patches // self.shuffle_factor**2

    def validate(self) -> Self:
        """Check sizes against each other.

        Raises:
            UserError: naming the rule and the values.
        """
        vision = self.vision
        if self.downsample_ratio != 1 / self.shuffle_factor:
            ratio = f"model.downsample_ratio is {self.downsample_ratio}"
            raise UserError(f"{ratio}: must be 1 divided by a whole number")
        patches = vision.image_size // vision.patch_size
        multiples = [
            ("vision.image_size", vision.image_size, "patch_size", vision.patch_size),
            ("vision.image_size / patch_size", patches, "pixel shuffle's factor", self.shuffle_factor),
            ("vision.hidden_size", vision.hidden_size, "num_attention_heads", vision.num_attention_heads),
        ]
        for name, value, divisor_name, divisor in multiples:
            if value % divisor:
                raise UserError(f"model.{name} is {value}: must be a multiple of {divisor} ({divisor_name})")
        self.text.validate()
        return self

    def with_data(self, *, vocab_size: int, image_token_index: int) -> "EagleConfig":
        """The model of a run: this section with what it leaves null filled from the data's manifest.

        Raises:
            UserError: a value is set here and the data has another.
        """
        own, token = copy.deepcopy(self), self.image_token_index
        rows = self.text.vocab_size if self.text.vocab_size is not None else vocab_size
        config = EagleConfig(
            vision=own.vision,
            text=TextConfig(**vars(own.text) | {"vocab_size": rows}),
            image_token_index=token if token is not None else image_token_index,
            downsample_ratio=own.downsample_ratio,
            initializer_range=own.initializer_range,
        )
        if config.image_token_index != image_token_index:
            raise UserError(
                f"model.image_token_index is {config.image_token_index} and the data's <IMG_CONTEXT> is "
                f"{image_token_index}: the data was prepared with another tokenizer"
            )
        if vocab_size > config.text.vocab_size:
            raise UserError(
                f"the data's tokenizer has {vocab_size} tokens and model.text.vocab_size is "
                f"{config.text.vocab_size}: the data was prepared with another tokenizer"
            )
        return config.validate()

    def complete(self) -> "EagleConfig":
        """The model that this section alone describes.

        Raises:
            UserError: it leaves something to the data.
        """
        if self.text.vocab_size is None or self.image_token_index is None:
            raise UserError("model.text.vocab_size and model.image_token_index: null is taken from data")
        return self.with_data(vocab_size=self.text.vocab_size, image_token_index=self.image_token_index)


@dataclass
class EagleConfig(ModelSection):
    """The model of a run: nothing is left open."""

    text: TextConfig = field(kw_only=True)
    image_token_index: Annotated[int, Range(0, 2**24)] = field(kw_only=True)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "EagleConfig":
        """From the contents of an Eagle 2.5 `config.json`.

        Raises:
            UserError: a part this implementation does not have, or a missing key.
        """
        with missing_keys_named():
            require(
                hf,
                model_type="eagle_2_5_vl",
                select_layer=-1,
                use_pixel_shuffle=True,
                mlp_connector_layers=2,
            )
            text = dict(
                hf["text_config"] if "text_config" in hf or "llm_config" not in hf else hf["llm_config"]
            )
            text.setdefault("tie_word_embeddings", hf.get("tie_word_embeddings", False))
            own = {
                "vision": to_dict(VisionConfig.from_hf(hf["vision_config"])),
                "text": to_dict(TextConfig.from_hf(text)),
                "image_token_index": hf["image_token_index"],
                "downsample_ratio": hf.get("downsample_ratio", 0.5),
            }
            return from_dict(cls, own, "config.json").validate()

    def to_hf(self) -> dict[str, Any]:
        """Contents of `config.json`, without what only an exporter knows (`auto_map`, dtype)."""
        vision, text = self.vision, self.text
        return {
            "architectures": ["Eagle2_5_VLForConditionalGeneration"],
            "model_type": "eagle_2_5_vl",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_act": "gelu_pytorch_tanh",
                "attention_dropout": 0.0,
                **{f.name: getattr(vision, f.name) for f in fields(vision)},
            },
            "text_config": text.to_hf(),
            "image_token_index": self.image_token_index,
            "downsample_ratio": self.downsample_ratio,
            "force_image_size": vision.image_size,
            "select_layer": -1,
            "use_pixel_shuffle": True,
            "mlp_connector_layers": 2,
            "dynamic_image_size": True,
            "use_thumbnail": True,
            "min_dynamic_tiles": 1,
            "max_dynamic_tiles": 12,
            "template": "qwen2-chat",
            "tie_word_embeddings": text.tie_word_embeddings,
        }


PRESETS: dict[str, ModelSection] = {
    # Small enough for a laptop's CPU, with grouped queries and every part of the real model.
    "tiny": ModelSection(),
    "eagle2.5-8b": ModelSection(
        vision=VisionConfig(
            image_size=448,
            patch_size=14,
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
        ),
        text=TextSection(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=151676,
            max_position_embeddings=131072,
        ),
        image_token_index=151667,
    ),
}
# The published 1B: Qwen2.5-0.5B behind the same encoder.
PRESETS["eagle2.5-1b"] = copy.deepcopy(PRESETS["eagle2.5-8b"])
PRESETS["eagle2.5-1b"].text = TextSection(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151674,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
)
# Real widths at cut depth: what one GPU can train, for measuring kernels and memory. 1.1 B parameters.
PRESETS["eagle2.5-1b-proxy"] = copy.deepcopy(PRESETS["eagle2.5-8b"])
PRESETS["eagle2.5-1b-proxy"].vision.num_hidden_layers = 4
PRESETS["eagle2.5-1b-proxy"].text.num_hidden_layers = 2
PRESETS["eagle2.5-1b-proxy"].text.tie_word_embeddings = True
# Qwen3 behind the same encoder: rows of its tokenizer's 151,669 tokens and Eagle's eleven.
_QWEN3: dict[str, Any] = {
    "head_dim": 128,
    "vocab_size": 151680,
    "max_position_embeddings": 40960,
}
_BODIES = {
    "eagle2.5-qwen3-8b": TextSection(
        model_type="qwen3",
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "eagle2.5-qwen3-32b": TextSection(
        model_type="qwen3",
        **_QWEN3,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
    "eagle2.5-qwen3-30b-a3b": TextSection(
        model_type="qwen3_moe",
        **_QWEN3,
        hidden_size=2048,
        intermediate_size=6144,  # of layers without experts, of which there are none
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        experts=ExpertsConfig(
            num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True
        ),
    ),
}
for _name, _text in _BODIES.items():
    PRESETS[_name] = copy.deepcopy(PRESETS["eagle2.5-8b"])
    PRESETS[_name].text, PRESETS[_name].image_token_index = _text, 151671


def preset(name: str) -> ModelSection:
    """A copy of the preset `name`.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} does not exist: choose one of {', '.join(PRESETS)}")
    return copy.deepcopy(PRESETS[name])


def expand_preset(model: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run file's `model` section with `preset: NAME` and `hf: FILE` replaced by the values they stand for.

    `hf` is a config.json of Eagle 2.5, of a language model or of a SigLIP encoder, which replaces that part
    of the preset. What the section itself says wins; `config.from_dict` checks the result.

    Args:
        source: the model that the run goes on with; where neither is named, it gives what is left out.

    Raises:
        UserError: no such preset, or a file that is no such configuration.
    """
    own = dict(model)
    name, file = own.pop("preset", None), own.pop("hf", None)
    for key, value in (("preset", name), ("hf", file)):
        if not isinstance(value, str | None):
            raise UserError(f"model.{key}: expected text, got {value!r}")
    if name is None and file is None:
        return _merged(source or {}, own)
    base = {} if name is None else to_dict(preset(name))
    if file is not None:
        base = _merged(base, _read_hf(Path(file)))
    return _merged(base, own)


def _read_hf(file: Path) -> dict[str, Any]:
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.hf: {file} cannot be read as a config.json: {error}") from None
    kinds: dict[Any, Callable[[], dict[str, Any]]] = {
        "eagle_2_5_vl": lambda: to_dict(EagleConfig.from_hf(hf)),
        "siglip_vision_model": lambda: {"vision": to_dict(VisionConfig.from_hf(hf))},
        # Its tokenizer is another than the preset's: the image token's id is the data's.
        **dict.fromkeys(
            FAMILIES, lambda: {"text": to_dict(TextConfig.from_hf(hf)), "image_token_index": None}
        ),
    }
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if kind not in kinds:
        raise UserError(f"model.hf: {file} has model_type {kind!r}: one of {', '.join(kinds)} is needed")
    return kinds[kind]()


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result

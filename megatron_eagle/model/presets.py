"""What an Eagle 2.5 model is: its sizes, in Hugging Face's words, and presets of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_eagle.config import to_dict
from megatron_eagle.errors import UserError

# Vocabulary rows are padded to this multiple for every tensor parallel size up to 4, so that a rank's
# share stays a multiple of 128 and a checkpoint has one shape whatever the layout.
VOCAB_MULTIPLE = 512


@dataclass
class VisionConfig:
    """SigLIP2 tower at a fixed resolution (HF `SiglipVisionModel`); lengths in pixels and features."""

    image_size: int = 64
    patch_size: int = 16
    hidden_size: int = 64
    intermediate_size: int = 136
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass
class TextConfig:
    """Qwen2.5 language model. `vocab_size: null` is taken from the data's manifest."""

    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int | None = None
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the output layer inside Megatron (`VOCAB_MULTIPLE`)."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass
class EagleConfig:
    """Eagle 2.5: SigLIP2 tower, pixel shuffle, two-layer connector, Qwen2.5.

    `image_token_index: null` is taken from the data's manifest.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_index: int | None = None
    downsample_ratio: float = 0.5
    # Standard deviation of a fresh model's weights (both source models use 0.02).
    initializer_range: float = 0.02

    @property
    def shuffle_factor(self) -> int:
        """Patches that pixel shuffle folds into one token, per side."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile: 256 for 448 px at patch 14."""
        return self.vision.num_patches // self.shuffle_factor**2

    def validate(self) -> "EagleConfig":
        """Check sizes against each other.

        Raises:
            UserError: naming the rule and the values.
        """
        vision, text = self.vision, self.text
        rules = [
            (vision.image_size % vision.patch_size == 0, "vision.image_size", "a multiple of patch_size"),
            (
                (vision.image_size // vision.patch_size) % self.shuffle_factor == 0,
                "vision.image_size / patch_size",
                f"a multiple of {self.shuffle_factor} (pixel shuffle)",
            ),
            (
                vision.hidden_size % vision.num_attention_heads == 0,
                "vision.hidden_size",
                "a multiple of num_attention_heads",
            ),
            (
                text.hidden_size % text.num_attention_heads == 0,
                "text.hidden_size",
                "a multiple of num_attention_heads",
            ),
            (text.head_dim % 2 == 0, "text head size", "even (rotary embedding)"),
            (
                text.num_attention_heads % text.num_key_value_heads == 0,
                "text.num_attention_heads",
                "a multiple of num_key_value_heads",
            ),
        ]
        for holds, name, rule in rules:
            if not holds:
                raise UserError(f"model.{name} must be {rule}: check the model section ({vision}, {text})")
        return self

    def with_data(self, *, vocab_size: int, image_token_index: int) -> "EagleConfig":
        """This configuration with what was left null filled from the data's manifest.

        Raises:
            UserError: a value is set here and the data has another.
        """
        config = copy.deepcopy(self)
        if config.text.vocab_size is None:
            config.text.vocab_size = vocab_size
        if config.image_token_index is None:
            config.image_token_index = image_token_index
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

    @classmethod
    def from_hf(cls, hf: dict) -> "EagleConfig":
        """From the contents of an Eagle 2.5 `config.json`.

        Raises:
            UserError: a part this implementation does not have, or a missing key.
        """
        try:
            if hf["model_type"] != "eagle_2_5_vl":
                raise UserError(f"config.json: model_type is {hf['model_type']!r}, not 'eagle_2_5_vl'")
            vision, text = hf["vision_config"], hf["text_config"]
            supported = {
                "vision_config.model_type": (vision["model_type"], "siglip_vision_model"),
                "vision_config.hidden_act": (vision.get("hidden_act"), "gelu_pytorch_tanh"),
                "text_config.model_type": (text["model_type"], "qwen2"),
                "select_layer": (hf.get("select_layer", -1), -1),
                "use_pixel_shuffle": (hf.get("use_pixel_shuffle", True), True),
                "mlp_connector_layers": (hf.get("mlp_connector_layers", 2), 2),
                "text_config.use_sliding_window": (text.get("use_sliding_window", False), False),
                "text_config.rope_scaling": (text.get("rope_scaling"), None),
            }
            for name, (value, expected) in supported.items():
                if value != expected:
                    raise UserError(f"config.json: {name} is {value!r}; only {expected!r} is supported")
            # transformers 5 moved rope_theta into rope_parameters.
            rope = text.get("rope_parameters") or {}
            extra = {"rope_theta": text.get("rope_theta", rope.get("rope_theta", 1e6))}
            extra["tie_word_embeddings"] = text.get(
                "tie_word_embeddings", hf.get("tie_word_embeddings", False)
            )
            return cls(
                vision=VisionConfig(**_known(VisionConfig, vision)),
                text=TextConfig(**{**_known(TextConfig, text), **extra}),
                image_token_index=hf["image_token_index"],
                downsample_ratio=hf.get("downsample_ratio", 0.5),
            ).validate()
        except KeyError as error:
            raise UserError(f"config.json: {error.args[0]} is missing") from None

    def to_hf(self) -> dict:
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
            "text_config": {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "hidden_act": "silu",
                "attention_dropout": 0.0,
                "use_sliding_window": False,
                **{f.name: getattr(text, f.name) for f in fields(text)},
            },
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


def _known(cls: type, values: dict) -> dict:
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


PRESETS: dict[str, EagleConfig] = {
    # Small enough for a laptop's CPU, with grouped queries and every part of the real model.
    "tiny": EagleConfig(),
    "eagle2.5-8b": EagleConfig(
        vision=VisionConfig(
            image_size=448,
            patch_size=14,
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
        ),
        text=TextConfig(
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


def preset(name: str) -> EagleConfig:
    """A copy of the preset `name`.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} does not exist: choose one of {', '.join(PRESETS)}")
    return copy.deepcopy(PRESETS[name])


def expand_preset(model: Mapping[str, Any]) -> dict[str, Any]:
    """A run file's `model` section with `preset: NAME` replaced by that preset's values.

    What the section itself says wins over the preset; `config.from_dict` checks the result.
    """
    own = dict(model)
    name = own.pop("preset", None)
    return _merged(to_dict(preset(name)), own) if name is not None else own


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result

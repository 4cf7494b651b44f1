"""Configuration of Eagle 2.5: a SigLIP encoder, a pixel-shuffle connector and a Qwen language model.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x; vLLM reads this file and nothing else of the remote code).
"""

from typing import Any

from transformers import (
    AutoConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

# The first is that of a configuration which says no model_type; vLLM builds the model of the given name.
_LANGUAGE: dict[type[Any], str] = {
    Qwen2Config: "Qwen2ForCausalLM",
    Qwen3Config: "Qwen3ForCausalLM",
    Qwen3MoeConfig: "Qwen3MoeForCausalLM",
}


def _sub_config(value: Any, *classes: type[Any]) -> Any:
    """`value` as one of the classes: a config is taken as it is, a dict is parsed by its `model_type`, None
    gives the defaults of the first."""
    if isinstance(value, PretrainedConfig):
        return value
    value = dict(value or {})
    by_name = {one.model_type: one for one in classes}
    declared = value.get("model_type", classes[0].model_type)
    if declared not in by_name:
        needed = " or ".join(f"'{name}'" for name in by_name)
        raise ValueError(f"Eagle 2.5 needs model_type {needed}, the config says '{declared}'")
    return by_name[declared](**value)


class Eagle2_5_VLConfig(PretrainedConfig):
    """Everything needed to build the model and to preprocess its inputs.

    Args:
        vision_config: `SiglipVisionConfig` or its dict; `image_size` is the tile side in pixels.
        text_config: `Qwen2Config`, `Qwen3Config`, `Qwen3MoeConfig` or a dict of one.
        image_token_index: id of `<IMG_CONTEXT>`; its positions receive the visual features.
        downsample_ratio: side ratio of the pixel shuffle (0.5: four patches become one token).
        mlp_connector_layers: 2 (LayerNorm, Linear, GELU, Linear).
        select_layer: -1, the vision encoder's last layer after `post_layernorm`; nothing else is supported.
        force_image_size: tile side in pixels; defaults to the vision encoder's `image_size`.
        min_dynamic_tiles, max_dynamic_tiles: tiles an image may be cut into, thumbnail not counted.
            `min_dynamic_patch` and `max_dynamic_patch` are the same numbers under the names vLLM reads.

    Raises:
        ValueError: another encoder or language model, or an unsupported connector or layer.
    """

    model_type = "eagle_2_5_vl"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: SiglipVisionConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        image_token_index: int = 151667,
        downsample_ratio: float = 0.5,
        use_pixel_shuffle: bool = True,
        mlp_connector_layers: int = 2,
        select_layer: int = -1,
        force_image_size: int | None = None,
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        min_dynamic_tiles: int | None = None,
        max_dynamic_tiles: int | None = None,
        min_dynamic_patch: int | None = None,
        max_dynamic_patch: int | None = None,
        pad2square: bool = False,
        template: str = "qwen2-chat",
        loss_version: str = "efficient_v2_cp_head",
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        vision: Any = _sub_config(vision_config, SiglipVisionConfig)
        text: Any = _sub_config(text_config, *_LANGUAGE)
        if not getattr(text, "architectures", None):
            text.architectures = [_LANGUAGE[type(text)]]
        for name, value, supported in (
            ("select_layer", select_layer, -1),
            ("mlp_connector_layers", mlp_connector_layers, 2),
            ("use_pixel_shuffle", use_pixel_shuffle, True),
        ):
            if value != supported:
                raise ValueError(f"{name} {value} is not supported, only {supported} is")

        self.vision_config = vision
        self.text_config = text
        self.image_token_index = image_token_index
        self.downsample_ratio = downsample_ratio
        self.use_pixel_shuffle = use_pixel_shuffle
        self.mlp_connector_layers = mlp_connector_layers
        self.select_layer = select_layer
        self.force_image_size = vision.image_size if force_image_size is None else force_image_size
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.min_dynamic_tiles = _first(min_dynamic_tiles, min_dynamic_patch, 1)
        self.max_dynamic_tiles = _first(max_dynamic_tiles, max_dynamic_patch, 12)
        self.min_dynamic_patch = self.min_dynamic_tiles
        self.max_dynamic_patch = self.max_dynamic_tiles
        self.pad2square = pad2square
        self.template = template
        self.loss_version = loss_version
        self.initializer_range = initializer_range
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    @property
    def shuffle_factor(self) -> int:
        """Side of the square of patches that the pixel shuffle folds into one token."""
        return int(round(1 / self.downsample_ratio))

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: (tile side / patch side x downsample ratio) squared."""
        vision = self.vision_config
        return int(vision.image_size // vision.patch_size // self.shuffle_factor) ** 2


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)

"""vLLM's network of Eagle 2.5, for tiles that the export's own processor cut."""

from typing import Any

import torch
from vllm.model_executor.models.eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processing import (
    Eagle2_5_VLDummyInputs,
    Eagle2_5_VLMultiModalProcessor,
    Eagle2_5_VLProcessingInfo,
)


@MULTIMODAL_REGISTRY.register_processor(
    Eagle2_5_VLMultiModalProcessor, info=Eagle2_5_VLProcessingInfo, dummy_inputs=Eagle2_5_VLDummyInputs
)
class Eagle2_5_VL(Eagle2_5_VLForConditionalGeneration):
    """Features of pictures and videos alike."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        # Its table of positions has as many rows as this says; what is beyond is read from other memory.
        text = vllm_config.model_config.hf_config.text_config
        longest = vllm_config.model_config.max_model_len
        rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        if rope.get("rope_type") == "yarn":  # the table ends where YaRN does
            reach = round(rope["factor"] * rope["original_max_position_embeddings"])
            if longest > reach:
                raise ValueError(f"--max-model-len {longest}: the model's YaRN reaches {reach} tokens")
        text.max_position_embeddings = max(text.max_position_embeddings, longest)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """As the export's template writes it."""
        return f"<{modality.removesuffix('_embeds')}-{i}>"

    def embed_multimodal(self, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Features [tokens, hidden] of each item, of `{kind}_pixels` [tiles, 3, S, S]."""
        found: list[torch.Tensor] = []
        for kind in ("image", "video"):
            pixels, tiles = kwargs.get(f"{kind}_pixels"), kwargs.get(f"{kind}_tiles")
            if pixels is None or tiles is None:
                continue
            features = self.extract_feature(pixels.to(self.mlp1[1].weight.dtype))
            sizes = [int(count) * features.shape[1] for count in tiles.flatten().tolist()]
            found += features.flatten(0, 1).split(sizes)
        return tuple(found)

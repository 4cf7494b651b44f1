"""SigLIP2 encoder at a fixed resolution, as a Megatron `TransformerBlock` with bidirectional attention.

Shapes: n tiles, p patches of a tile, h features.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_eagle.model import presets
from megatron_eagle.model.layers import LayerClasses, ready
from megatron_eagle.model.specs import vision_block


class VisionModel(MegatronModule):
    """Tiles to patch features; no class token, no pooling head."""

    def __init__(
        self,
        vision: presets.VisionConfig,
        config: TransformerConfig,
        classes: LayerClasses,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        dtype = config.params_dtype
        self.patch_embedding = torch.nn.Conv2d(
            vision.num_channels, vision.hidden_size, vision.patch_size, vision.patch_size, dtype=dtype
        )
        self.position_embedding = torch.nn.Embedding(vision.num_patches, vision.hidden_size, dtype=dtype)
        self.encoder = TransformerBlock(
            config, vision_block(config, classes, groups.tp), pg_collection=groups
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[n, channels, S, S] in [-1, 1] -> [n, p, h] after the final norm, patches row-major."""
        weight = self.patch_embedding.weight
        patches = self.patch_embedding(pixel_values.to(weight.dtype)).flatten(2)  # [n, h, p]
        ready(self.position_embedding)
        hidden = patches.permute(2, 0, 1) + self.position_embedding.weight[:, None]  # [p, n, h]
        features: Tensor = self.encoder(hidden.contiguous(), attention_mask=None)
        return features.transpose(0, 1)

"""From patch features to image tokens: pixel shuffle, norm, two linear layers.

Shapes: n tiles, p patches of a tile, h encoder features, t tokens of a tile, H language features.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megatron_eagle.hf_model.pixel_shuffle import pixel_shuffle


class Connector(MegatronModule):
    """LayerNorm (eps 1e-5), linear, erf GELU, linear; HF's `mlp1.{0,1,3}`."""

    def __init__(
        self, input_size: int, factor: int, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.factor = factor
        self.layer_norm = torch.nn.LayerNorm(input_size, eps=1e-5, dtype=config.params_dtype)
        shared = {"config": config, "init_method": config.init_method, "bias": True, "tp_group": groups.tp}
        self.linear_fc1 = ColumnParallelLinear(input_size, config.hidden_size, gather_output=False, **shared)
        self.linear_fc2 = RowParallelLinear(
            config.hidden_size, config.hidden_size, input_is_parallel=True, skip_bias_add=False, **shared
        )

    def forward(self, features: Tensor) -> Tensor:
        """[n, p, h] -> [n * t, H], tiles and tokens in order."""
        tokens = self.layer_norm(pixel_shuffle(features, self.factor)).flatten(0, 1)
        hidden, _ = self.linear_fc1(tokens)
        out: Tensor = self.linear_fc2(F.gelu(hidden))[0]
        return out

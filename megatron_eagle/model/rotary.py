"""Rotary positions of packs: one table a pack and stage, applied to queries and keys just before attention.

Megatron would rotate in several passes over memory; its fused kernel belongs to Transformer Engine.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from eagle_kernels.dispatch import Implementation
from eagle_kernels.rope import inverse_frequencies, rope, rotary_table, yarn_frequencies
from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.backends import AttentionChoice
from megatron_eagle.model.text import TextConfig
from megatron_eagle.model.yarn import YarnConfig
from megatron_eagle.runtime.ring_groups import RingGroups


def rotary_frequencies(dim: int, theta: float, scaling: YarnConfig | None) -> Tensor:
    """Angles per position of each pair of a head's channels, fp32 [dim / 2]."""
    if scaling is None:
        return inverse_frequencies(dim, theta)
    return yarn_frequencies(
        dim,
        theta,
        factor=scaling.factor,
        original_length=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        truncate=scaling.truncate,
    )


class PackedRotaryTable(torch.nn.Module):
    """In place of `GPTModel.rotary_pos_emb`: Megatron asks for angles once a forward and gets none.

    Args:
        text: whose head size, theta and YaRN they are.
        dtype: of queries and keys, to which the table is rounded.
    """

    def __init__(self, text: TextConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, scaling = dtype, text.rope_scaling
        self.amplitude = 1.0 if scaling is None else scaling.amplitude
        self.frequencies: Tensor
        frequencies = rotary_frequencies(text.head_dim, text.rope_theta, scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def get_rotary_seq_len(
        self,
        inference_context: None,
        transformer: torch.nn.Module,
        transformer_input: Tensor,
        config: TransformerConfig,
        packed_seq_params: PackedSequence,
    ) -> PackedSequence:
        """Megatron asks for a length and hands it to `forward`: the pack itself says more."""
        return packed_seq_params

    def forward(
        self, packed: PackedSequence, packed_seq: bool = False, cp_group: ProcessGroup | None = None
    ) -> None:
        """Leaves cosines and sines of the local tokens, [s, d / 2], in the pack."""
        packed.rotary_table = rotary_table(packed.position_ids, self.frequencies, self.dtype, self.amplitude)


class RotaryAttention(MegatronModule):
    """Core attention of queries and keys that arrive unrotated."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        attention: AttentionChoice,
        ring: RingGroups,
        kernels: Implementation = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.core, self.kernels = attention.build(config, *args, ring=ring, **kwargs), kernels

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: PackedSequence,
        **kwargs: Any,
    ) -> Tensor:
        """query [s, 1, np, d], key and value [s, 1, ng, d] -> [s, 1, np * d]."""
        table = packed_seq_params.rotary_table
        assert table is not None, "the stage's PackedRotaryTable runs first"
        cos, sin = table
        query, key = (rope(x.squeeze(1), cos, sin, self.kernels).unsqueeze(1) for x in (query, key))
        out: Tensor = self.core(query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
        return out

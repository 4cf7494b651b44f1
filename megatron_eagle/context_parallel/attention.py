"""Core attention of the language model: packed documents, grouped queries, context parallel keys.

Shapes: s local tokens, S tokens of the pack, b batch (1: a microbatch is one pack), np query heads,
ng key-value heads, d head size, all per tensor parallel rank. Queries and keys arrive rotated.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.context_parallel.gather_kv import GatherKVAttention
from megatron_eagle.context_parallel.layout import Segment, SequenceLayout


@dataclass
class PackedSequence(PackedSeqParams):
    """What the layers must know of a pack; travels through Megatron as `packed_seq_params`.

    `qkv_format` is "sbhd" although documents are packed: "thd" would make Megatron drop the batch
    dimension and rotate per document in Transformer Engine's own zigzag.
    """

    position_ids: Tensor | None = None  # [s] positions of the local tokens inside their documents
    layout: SequenceLayout | None = None
    segments: tuple[Segment, ...] = ()  # what the local queries see

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"


class AttentionBackend(Protocol):
    """A pair of kernels: bottom-right causal attention over segments, and its gradient.

    Kept apart from autograd so that activation offload can leave core attention out of recomputation.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        """q [s, np, d], k and v [S, ng, d] -> out [s, np, d] and log-sum-exp fp32 [np, s]."""

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: tuple[Segment, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> grad_q like q; grad_k and grad_v fp32 [S, ng, d], zero where nothing attended."""


class CoreAttention(MegatronModule):
    """Megatron's `core_attention` plug-in."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        *,
        backend: AttentionBackend,
    ) -> None:
        super().__init__(config=config)
        self.backend = backend
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> Tensor:
        """query [s, 1, np, d], key and value [s, 1, ng, d] -> [s, 1, np * d]."""
        out = GatherKVAttention.apply(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            self.backend,
            packed_seq_params.layout,
            packed_seq_params.segments,
            self.scale,
            self.cp_group,
        )
        return out.flatten(1).unsqueeze(1)


class PackedRotaryEmbedding(torch.nn.Module):
    """Rotary angles of the pack's own positions; takes the place of `GPTModel.rotary_pos_emb`."""

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, config, packed_seq_params
    ) -> PackedSequence:
        """Megatron asks for a length and hands it to `forward`: the pack itself says more."""
        return packed_seq_params

    def forward(self, packed: PackedSequence, packed_seq: bool = False, cp_group=None) -> Tensor:
        """-> angles fp32 [s, 1, 1, d], halves repeated (Qwen's half-split rotation)."""
        positions = packed.position_ids.float()
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=positions.device) / self.dim
        angles = torch.outer(positions, self.base**-exponent)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

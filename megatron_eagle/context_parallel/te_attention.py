"""Transformer Engine's core attention with its own context parallelism: a peer to compare with.

It sends keys round a ring (`cp_comm_type` p2p) and expects that rank r of `size` holds chunks r and
2 * size - 1 - r of every document, each document a multiple of 2 * size tokens: the layout
zigzag_per_document over documents that were filled up (`padding.py`). Padding is handed to it as tokens like
others, so that its flash-attn path, which cannot skip padding between documents, may be taken too.

It is no `AttentionBackend`: forward and backward belong together and keys are exchanged inside. So a layer
that is recomputed or offloaded runs it again.
"""

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.libraries import why_not_library
from megatron_eagle.runtime.parallel import ParallelConfig


def check_te_attention(parallel: ParallelConfig) -> None:
    """
    Raises:
        UserError: a layout that it cannot work with, and the setting that it can.
    """
    if parallel.packs > 1:
        raise UserError(
            f"layers.attention te cannot divide {parallel.packs} packs over one group: set "
            "data.packs_per_sequence=1, or choose another attention"
        )
    if parallel.context_parallel_size == 1:
        return
    needed = {
        "context_parallel_layout": "zigzag_per_document",
        "pad_documents": True,
        "ulysses_parallel_size": 1,
        "context_parallel_comm": "auto",
    }
    for name, value in needed.items():
        if getattr(parallel, name) != value:
            raise UserError(
                f"layers.attention te divides every document into equal chunks over context_parallel_size "
                f"{parallel.context_parallel_size} and has its own ring: set "
                f"parallel.{name}={str(value).lower()}, or choose another attention"
            )


class TransformerEngineAttention(MegatronModule):
    """Megatron's `core_attention` plug-in. Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        if missing := why_not_library("transformer_engine.pytorch"):
            return missing
        from megatron.core.utils import is_te_min_version

        # Before, documents of a pack could not be told apart under context parallelism.
        return None if is_te_min_version("1.10.0") else "it needs Transformer Engine 1.10"

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        # Not at the top: without Transformer Engine it is a mock.
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.attention = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale if softmax_scale is not None else config.kv_channels**-0.5,
            cp_comm_type="p2p",
            pg_collection=pg_collection,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackedSequence,
    ) -> Tensor:
        """query [s, 1, np, d], key and value [s, 1, ng, d] -> [s, 1, np * d]."""
        out: Tensor = self.attention(
            query=query.squeeze(1),
            key=key.squeeze(1),
            value=value.squeeze(1),
            attention_mask=None,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=whole_documents(packed_seq_params),
        )
        return out.reshape(query.shape[0], 1, -1)


def whole_documents(packed: PackedSequence) -> PackedSeqParams:
    """A pack as Transformer Engine takes it: lengths over all ranks, in one tensor for all four, by which it
    knows that nothing lies between documents."""
    lengths = packed.cu_seqlens_q
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=lengths,
        cu_seqlens_kv_padded=lengths,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_kv=packed.max_seqlen_q,
    )

"""Core attention of the language model: packed documents, grouped queries, context parallel keys.

Context parallel ranks are Ulysses groups (adjacent ranks, which trade tokens for heads) times the ranks that
exchange keys, by gathering them or round a ring; either may be a group of one.

Shapes: s local tokens, S tokens of the pack, b batch (1: a microbatch is one pack), np query heads,
ng KV heads, d head size, all per tensor parallel rank. Queries and keys arrive rotated.
"""

from dataclasses import dataclass, field

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from eagle_kernels.activation_offload import KeptResults
from megatron_eagle.context_parallel.attention_backend import AttentionBackend
from megatron_eagle.context_parallel.exchange_choice import KeyExchange
from megatron_eagle.context_parallel.gather_kv import GatherKVAttention
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.pack_rows import PackRows
from megatron_eagle.context_parallel.ring import RingAttention
from megatron_eagle.context_parallel.ring_plan import RingExchange
from megatron_eagle.context_parallel.ulysses import HeadsToTokens, TokensToHeads
from megatron_eagle.runtime.ring_groups import RingGroups

NO_RING = RingGroups(None)


@dataclass
class PackedSequence(PackedSeqParams):
    """What the layers must know of a pack; travels through Megatron as `packed_seq_params`.

    `qkv_format` is "sbhd" although documents are packed: "thd" would make Megatron drop the batch
    dimension and rotate per document in Transformer Engine's own zigzag.
    """

    # Megatron's own fields have defaults.
    position_ids: Tensor = field(kw_only=True)  # [s] positions of the local tokens inside their documents
    layout: SequenceLayout = field(kw_only=True)  # over all context parallel ranks
    exchange: KeyExchange = field(kw_only=True)  # this rank's part, on its device
    rotary_table: tuple[Tensor, Tensor] | None = None  # cosines and sines, set on each pipeline stage
    replay: KeptResults | None = None  # what an offloaded layer keeps of its attention
    pack_rows: PackRows | None = None  # for the losses of routers; None: they have none

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: AttentionBackend,
    exchange: KeyExchange,
    scale: float,
    key_group: ProcessGroup,
    ulysses_group: ProcessGroup | None = None,
    ring: RingGroups = NO_RING,
    replay: KeptResults | None = None,
) -> Tensor:
    """Attention of this rank's queries over the pack: q [s, np, d], k and v [s, ng, d] -> [s, np, d].

    Args:
        exchange: `plan_keys` for this rank's place in `key_group`, on the device of q.
        key_group: ranks that hold other tokens in attention.
        ulysses_group: ranks that take other heads in attention; None: this rank takes all.
        ring: the same ranks as `key_group`, for what goes round.
        replay: keeps the attention's results, or has them from an earlier run; None: neither.
    """
    queries, keys = q.shape[1], k.shape[1]
    if ulysses_group is not None:
        q, k, v = TokensToHeads.apply(q, k, v, ulysses_group)
    out: Tensor
    if isinstance(exchange, RingExchange):
        out = RingAttention.apply(q, k, v, backend, exchange, scale, ring, replay)
    else:
        # One KV head at a time where keys travel, so that they do so while attention runs.
        parts = 1 if exchange.kind == "none" else k.shape[1]
        out = GatherKVAttention.apply(q, k, v, backend, exchange, scale, key_group, parts, replay)
    if ulysses_group is not None:
        out = HeadsToTokens.apply(out, queries, keys, ulysses_group)
    return out


class CoreAttention(MegatronModule):
    """Megatron's `core_attention` plug-in."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        backend: AttentionBackend,
        ring: RingGroups,
    ) -> None:
        super().__init__(config=config)
        self.backend, self.ring = backend, ring
        # The configuration decides, not which groups exist. Megatron's hierarchy: adjacent ranks first.
        has_ulysses = config.hierarchical_context_parallel_sizes is not None
        self.ulysses_group: ProcessGroup | None
        self.key_group: ProcessGroup
        self.ulysses_group, self.key_group = pg_collection.hcp if has_ulysses else (None, pg_collection.cp)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

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
        out = context_parallel_attention(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            self.backend,
            packed_seq_params.exchange,
            self.scale,
            self.key_group,
            self.ulysses_group,
            self.ring,
            packed_seq_params.replay,
        )
        return out.flatten(1).unsqueeze(1)

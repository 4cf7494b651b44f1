"""Model FLOPs of a training step, exactly: what the mathematics needs, not what recomputation repeats.

A matrix product of [a, b] by [b, c] costs 2abc. Its backward costs as much for the input's gradient
and as much again for the weight's. Attention over a causal document of n tokens has n^2 / 2 query-key
pairs (the convention of FlashAttention's benchmarks); a tile of p patches has p^2.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_eagle.context_parallel.balanced import PairCosts
from megatron_eagle.context_parallel.exchange_choice import ASSUMED, ExchangeCosts
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import LocalShapes
from megatron_eagle.model.text import TextConfig
from megatron_eagle.runtime.parallel import ParallelConfig

PARTS = ("vision", "connector", "language")


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, by part."""

    language_linear: float
    language_attention: float
    vision: float
    connector: float

    @property
    def total(self) -> float:
        return self.language_linear + self.language_attention + self.vision + self.connector


def training_flops(
    eagle: EagleConfig,
    *,
    tokens: int,
    sum_squared_lengths: float,
    tiles: float,
    trainable: Collection[str] = PARTS,
    adapters: bool = False,
    layers: int | None = None,
) -> StepFlops:
    """FLOPs of forward and backward over a batch.

    Args:
        tokens: through the language model and its output layer, image tokens included.
        sum_squared_lengths: sum over documents of their squared length in tokens.
        tiles: through the vision encoder.
        trainable: which of `PARTS` have gradients; a frozen part costs its forward, and the gradient of
            its input where an earlier part is trained.
        adapters: low-rank adapters train in place of the language model's weights; their own products,
            below one part in a hundred, are left out.
        layers: of the language model, those of a pipeline stage, say; None: all.
    """
    vision, text = eagle.vision, eagle.text
    layers, h = text.num_hidden_layers if layers is None else layers, text.hidden_size
    queries = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    layer = h * (queries + 2 * kv) + queries * h + feed_forward_products(text)
    linear = layers * layer + h * text.vocab_size

    patches, c = vision.num_patches, vision.hidden_size
    encoder_layer = 4 * c * c + 2 * c * vision.intermediate_size
    embedding = vision.num_channels * vision.patch_size**2 * c
    encoder = patches * (vision.num_hidden_layers * encoder_layer + embedding)
    encoder_attention = vision.num_hidden_layers * 2 * patches**2 * c
    shuffled = c * eagle.shuffle_factor**2
    connector = eagle.tokens_per_tile * (shuffled * h + h * h)

    # Times a product is done: forward, for its input's gradient, for its weight's. The encoder's very first
    # product needs no input gradient; it is counted, as in everybody's 6 FLOPs per parameter and token.
    passes: dict[str, int] = {}
    attention_passes: dict[str, int] = {}
    upstream = False
    for part in PARTS:
        trained = part in trainable
        upstream |= trained
        passes[part] = 1 + upstream + trained
        attention_passes[part] = 3 if upstream else 1
    if adapters:
        passes["language"], attention_passes["language"] = 2, 3
    return StepFlops(
        language_linear=2 * tokens * linear * passes["language"],
        language_attention=2
        * 2
        * layers
        * (sum_squared_lengths / 2)
        * queries
        * attention_passes["language"],
        vision=2 * tiles * (encoder * passes["vision"] + encoder_attention * attention_passes["vision"]),
        connector=2 * tiles * connector * passes["connector"],
    )


def feed_forward_products(text: TextConfig) -> int:
    """Weights that a token is multiplied with in a layer's MLP; with experts, the router's and those of the
    experts that it is sent to."""
    experts, h = text.experts, text.hidden_size
    if experts is None:
        return 3 * h * text.intermediate_size
    return h * experts.num_experts + experts.num_experts_per_tok * 3 * h * experts.moe_intermediate_size


def patch_cost(eagle: EagleConfig) -> float:
    """Forward FLOPs of a patch, encoder and connector, over those of a unit of squared document length."""
    flops = training_flops(eagle, tokens=0, sum_squared_lengths=1, tiles=1, trainable=())
    return (flops.vision + flops.connector) / eagle.vision.num_patches / flops.language_attention


def pair_costs(eagle: EagleConfig) -> PairCosts:
    """What `balanced` weighs beside attention, forward and backward, in query-key pairs.

    A key from another rank counts as far as attention does not hide it: its first head group. One from
    another node is a message of its own (`ranges`).
    """
    text = eagle.text
    h, queries = text.hidden_size, text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    weights = h * (queries + 2 * kv) + queries * h + feed_forward_products(text)

    def key(link: float) -> int:
        return max(1, round(_key_bytes(text.head_dim) / link / _pair_seconds(queries)))

    return PairCosts(
        token=max(1, round(6 * weights / ASSUMED.dense / _pair_seconds(queries))),
        key=key(ASSUMED.node),
        far_key=key(ASSUMED.network * ASSUMED.messages),
    )


def exchange_costs(eagle: EagleConfig, parallel: ParallelConfig, ranks_per_node: int) -> ExchangeCosts:
    """What the choice of an exchange of keys weighs."""
    shapes, d = LocalShapes(eagle, parallel), eagle.text.head_dim
    kv_heads, queries = shapes.attention_kv_heads, shapes.attention_heads * d
    pair = _pair_seconds(queries)

    def key(link: float) -> int:
        return max(1, round(kv_heads * _key_bytes(d) / link / pair))

    # Of a head group: keys of two in bf16, and fp32 gradients of one in four copies (`memory_model`).
    held = 2 * d * (2 * 2 + 4 * 4)
    return ExchangeCosts(
        key=key(ASSUMED.node),
        far_key=key(ASSUMED.network),
        node=parallel.key_ranks_per_node(ranks_per_node),
        step=round(ASSUMED.step / pair),
        # Output and dq of one step in bf16, added to sums in fp32.
        merge=round(2 * (2 + 4 + 4) * queries / ASSUMED.memory / pair),
        head_groups=kv_heads,
        most_keys=int(1e9 * parallel.context_parallel_key_gb / held),
    )


def _pair_seconds(queries: float) -> float:
    """Of attention of one query and one key, forward and backward, for so many query features."""
    return 14 * queries / ASSUMED.attention


def _key_bytes(d: int) -> int:
    """Of a foreign key and value of one head: forward and backward in bf16, and their gradients in fp32."""
    return 2 * d * (2 + 2 + 4)

"""What a layout and a way of keys cost, counted from the plans that training makes; nothing is run.

Rates are those that `parallel.context_parallel_comm: auto` assumes (`ASSUMED` in `exchange_choice.py`): 600
TFLOP/s outside attention, 400 in it, 300 GB/s into a rank inside a node, 40 where ranks of several nodes take
part. Ulysses' all-to-alls are counted whole, for nothing hides them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megatron_eagle.context_parallel.exchange import Traffic, measure_traffic
from megatron_eagle.context_parallel.exchange_choice import (
    ASSUMED,
    Kind,
    choose_exchange,
    estimate,
    kept_keys,
    pairs_by_block,
)
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.planning import LayoutName, plan_layout, sequence_multiple
from megatron_eagle.context_parallel.ulysses import divides_heads
from megatron_eagle.model.flops import exchange_costs, pair_costs, training_flops
from megatron_eagle.model.presets import preset
from megatron_eagle.runtime.parallel import ContextParallelComm, ParallelConfig

NODE = 8  # ranks of a node
MODEL = preset("eagle2.5-8b").complete()
COSTS = pair_costs(MODEL)
LAYERS = MODEL.text.num_hidden_layers
QUERY_HEADS, KEY_HEADS, HEAD_DIM = (
    MODEL.text.num_attention_heads,
    MODEL.text.num_key_value_heads,
    MODEL.text.head_dim,
)


@dataclass(frozen=True)
class Way:
    """A layout, and how keys travel under it."""

    name: str
    comm: ContextParallelComm
    layout: LayoutName = "balanced"
    ulysses: int = 1
    in_node: bool = False  # a ring of nodes whose ranks gather each block

    def parallel(self, size: int) -> ParallelConfig | None:
        """Over `size` ranks; None: it is another way there."""
        keys, node = size // self.ulysses, NODE // self.ulysses
        if size % self.ulysses or (keys == 1 and self.comm != "ranges") or (self.in_node and keys <= node):
            return None
        if not divides_heads(self.ulysses, QUERY_HEADS, KEY_HEADS):
            return None
        return ParallelConfig(
            context_parallel_size=size,
            ulysses_parallel_size=self.ulysses,
            context_parallel_layout=self.layout,
            context_parallel_comm=self.comm,
            ring_node_size=node if self.in_node else 1,
        )


WAYS = (
    Way("gather", "gather"),
    Way("ranges", "ranges"),
    Way("ring", "ring"),
    Way("ring, zigzag", "ring", "zigzag"),
    Way("gather in a node x ring", "ring", in_node=True),
    Way("Ulysses 2 x ranges", "ranges", ulysses=2),
    Way("Ulysses 4 x ranges", "ranges", ulysses=4),
    Way("Ulysses 4 x gather", "gather", ulysses=4),
    Way("Ulysses 4 x ring", "ring", ulysses=4),
    Way("Ulysses 8 x ranges", "ranges", ulysses=8),
    Way("Ulysses 8 x ring", "ring", ulysses=8),
    Way("Ulysses 4 x gather x ring", "ring", ulysses=4, in_node=True),
)


@dataclass(frozen=True)
class Cost:
    """Of one sequence; seconds are of a layer, forward and backward."""

    pairs: np.ndarray  # int [ranks that exchange keys]: query-key pairs of each
    attention: float  # of the rank with most pairs
    exposed: float  # what is not hidden behind that: keys, waiting for others' steps, merging
    heads: float  # Ulysses' exchange
    key_bytes: int  # keys and their gradients that a rank holds at a time, most
    far_keys: int  # keys from other nodes that a rank needs, most
    kind: Kind  # what `auto` takes there


def plan(parallel: ParallelConfig, bounds: Sequence[int]) -> tuple[SequenceLayout, Traffic] | None:
    """As a run plans a sequence; None: it has no layout of that kind."""
    size = parallel.context_parallel_size // parallel.ulysses_parallel_size
    name = parallel.context_parallel_layout
    if bounds[-1] % sequence_multiple(name, size, parallel.ulysses_parallel_size):
        return None
    node = parallel.key_ranks_per_node(NODE)
    layout = plan_layout(name, bounds[-1], size, bounds, costs=COSTS, node=node)
    return layout, measure_traffic(layout, bounds)


def cost(parallel: ParallelConfig, bounds: Sequence[int], planned: tuple[SequenceLayout, Traffic]) -> Cost:
    """Of a sequence with these documents; `auto` is taken at its own choice."""
    layout, traffic = planned
    costs = exchange_costs(MODEL, parallel, NODE)
    pairs = pairs_by_block(layout, bounds)
    busiest = int(pairs.sum(axis=1).max())
    kind = choose_exchange(layout, bounds, traffic, "auto", costs)
    taken = kind if parallel.key_comm == "auto" or kind == "none" else parallel.key_comm
    node = parallel.ring_node_size
    total = busiest if taken == "none" else estimate(layout, bounds, traffic, costs, node)[taken].pairs
    share = layout.length // layout.size
    held = share * node if node > 1 and taken == "ring" else kept_keys(taken, layout, traffic)
    heads = max(1, KEY_HEADS // parallel.ulysses_parallel_size) if taken == "ring" else 1
    return Cost(
        pairs=pairs.sum(axis=1),
        attention=busiest * _pair_seconds(parallel),
        exposed=(total - busiest) * _pair_seconds(parallel),
        heads=_head_seconds(parallel, bounds[-1]),
        key_bytes=held * heads * 2 * HEAD_DIM * (2 * 2 + 4 * 4),  # as `exchange_costs` counts them
        far_keys=int(traffic.from_nodes(costs.node).received.max()),
        kind=kind,
    )


def _pair_seconds(parallel: ParallelConfig) -> float:
    """Of a layer's attention of one query and one key with a rank's heads, as `model.flops` has it."""
    return 14 * HEAD_DIM * (QUERY_HEADS / parallel.ulysses_parallel_size) / ASSUMED.attention


def _head_seconds(parallel: ParallelConfig, length: int) -> float:
    """Queries, keys, values and outputs of a rank to the others of its Ulysses group, and their gradients."""
    ulysses = parallel.ulysses_parallel_size
    link = ASSUMED.node if ulysses <= NODE else ASSUMED.network
    features = HEAD_DIM * 2 * (QUERY_HEADS + max(KEY_HEADS, ulysses))
    tokens = length / parallel.context_parallel_size
    return 2 * 2 * features * tokens * (ulysses - 1) / ulysses / link


def layer_seconds(parallel: ParallelConfig, pairs: float) -> float:
    """Of a layer's attention with so many pairs on a rank."""
    return pairs * _pair_seconds(parallel)


@cache
def token_seconds() -> float:
    """Of a token outside attention, all layers and the output layer, forward and backward."""
    flops = training_flops(MODEL, tokens=1, sum_squared_lengths=0, tiles=0, trainable=("language",))
    return flops.total / ASSUMED.dense


@cache
def patch_seconds() -> float:
    """Of a patch, encoder and connector, forward and backward."""
    flops = training_flops(MODEL, tokens=0, sum_squared_lengths=0, tiles=1)
    return flops.total / MODEL.vision.num_patches / ASSUMED.dense

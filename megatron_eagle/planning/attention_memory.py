"""What the backward of a layer's core attention holds, in bytes, while keys of other ranks come and go.

On a GPU: the workspace of FlashAttention 2, from the segments and keys that the layout really gives a rank.
On a CPU: the reference attention's score matrices. Letters: those of `model.shapes`, e bytes of an element.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_eagle.context_parallel.balanced import PairCosts
from megatron_eagle.context_parallel.exchange import measure_traffic
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.planning import LayoutName, plan_layout
from megatron_eagle.context_parallel.reference_attention import row_blocks
from megatron_eagle.model.flops import pair_costs
from megatron_eagle.model.shapes import PackShapes
from megatron_eagle.planning.memory_shapes import FP32, Workload

_BLOCK = 128  # queries of a segment are rounded up to it (flash_api.cpp, `mha_varlen_bwd`: total_q + 128 * b)


@dataclass(frozen=True)
class _Keys:
    """What a rank's queries see of a pack."""

    segments: int
    read: int  # keys of all segments together
    received: int  # different ones of them, its own too


def attention_backward(shapes: PackShapes, workload: Workload) -> int:
    """Bytes beside what the layer has kept, while the residual's gradient waits."""
    waiting = shapes.r * shapes.h * workload.element_size
    if workload.device == "cpu":
        return waiting + _eager(shapes, workload)
    ranks = _visible_keys(*_layout_of(shapes), _bounds(shapes, workload))
    return waiting + max(_flash(shapes, workload, keys) for keys in ranks)


def flash_workspace(
    *, tokens: int, segments: int, heads: int, kv_heads: int, keys: int, head: int, workload: Workload
) -> int:
    """What FlashAttention 2's backward allocates inside: the gradient of q in fp32 (deterministic: once for
    as many blocks as run at a time on one head and segment), sums of the softmax, and gradients of keys
    and values for each head of a group (flash_api.cpp: `dq_accum`, `softmax_d`, `dk_expanded`)."""
    rows = tokens + _BLOCK * segments
    copies = max(1, -(-workload.multiprocessors // (segments * heads))) if workload.deterministic else 1
    expanded = 2 * keys * heads * head * workload.element_size if kv_heads != heads else 0
    return copies * rows * heads * head * FP32 + heads * rows * FP32 + expanded


def _flash(shapes: PackShapes, workload: Workload, keys: _Keys) -> int:
    """Gradients of the output, q, k and v, and the kernel's workspace.

    With context parallelism that is so for one KV head at a time, with its keys, those of the next head on
    their way, and the gradients that are there already; or its gradients are added up in fp32. Of a ring it
    is all heads of two blocks, fp32 gradients of three, and of q.
    """
    e, d = workload.element_size, shapes.eagle.text.head_dim
    tokens, heads, kv_heads = shapes.s * shapes.ulysses, shapes.attention_heads, shapes.attention_kv_heads
    queries = tokens * heads * d * e
    travel = shapes.cp > shapes.ulysses
    if travel and shapes.parallel.key_comm != "ring":
        group = heads // kv_heads
        row = 2 * d  # key and value of one head
        kernel = flash_workspace(
            tokens=tokens, segments=keys.segments, heads=group, kv_heads=1, keys=keys.read, head=d,
            workload=workload,
        )  # fmt: skip
        coming = keys.received * row * e if kv_heads > 1 else 0
        back = kv_heads * tokens * row * FP32
        own = tokens * group * d * e if kv_heads > 1 else 0  # the heads' gradient of the output in one piece
        adding = (keys.read + 2 * keys.received) * row * FP32
        return (
            2 * queries
            + coming
            + back
            + keys.read * row * e
            + max(own + kernel + keys.read * row * e, adding)
        )
    if travel:
        part = tokens * 2 * kv_heads * d  # elements of one rank's block
        block = part * shapes.parallel.ring_node_size
        seen = min(keys.read, tokens * shapes.parallel.ring_node_size)
        kernel = flash_workspace(
            tokens=tokens, segments=keys.segments, heads=heads, kv_heads=kv_heads, keys=seen, head=d,
            workload=workload,
        )  # fmt: skip
        return (
            2 * queries
            + tokens * heads * d * FP32
            + 2 * block * e
            + 3 * part * FP32
            # Round nodes also the gradients that are being summed, and a part on its way.
            + (block * FP32 + part * e) * (shapes.parallel.ring_node_size > 1)
            + max(kernel, 2 * block * FP32)
        )
    kernel = flash_workspace(
        tokens=tokens, segments=keys.segments, heads=heads, kv_heads=kv_heads, keys=keys.read, head=d,
        workload=workload,
    )  # fmt: skip
    return 2 * queries + 2 * keys.read * kv_heads * d * e + kernel


def _bounds(shapes: PackShapes, workload: Workload) -> tuple[int, ...]:
    """Of documents as long as the longest: they have most keys."""
    document = workload.longest_document or shapes.length
    return (*range(0, shapes.length, document), shapes.length)


def _layout_of(shapes: PackShapes) -> tuple[LayoutName, int, int | None, PairCosts]:
    parallel = shapes.parallel
    return (
        parallel.context_parallel_layout,
        shapes.cp // shapes.ulysses,
        parallel.context_parallel_chunk_size,
        pair_costs(shapes.eagle),
    )


def _plan(
    name: LayoutName, size: int, chunk_size: int | None, costs: PairCosts, bounds: tuple[int, ...]
) -> SequenceLayout:
    return plan_layout(name, bounds[-1], size, bounds, chunk_size, costs=costs)


@lru_cache(maxsize=1024)
def _visible_keys(
    name: LayoutName, size: int, chunk_size: int | None, costs: PairCosts, bounds: tuple[int, ...]
) -> tuple[_Keys, ...]:
    """Of each rank, equal ones once."""
    layout = _plan(name, size, chunk_size, costs, bounds)
    needed = measure_traffic(layout, bounds).needed.sum(axis=1)
    found = set()
    for rank in range(layout.size):
        table = layout.segment_table(rank, bounds)
        read = int(np.sum(table[:, 3] - table[:, 2]))
        found.add(_Keys(len(table), read, int(needed[rank])))
    return tuple(sorted(found, key=lambda keys: keys.read))


def _eager(shapes: PackShapes, workload: Workload) -> int:
    """Gradients of q and of the output, and either the score matrices with the fp32 gradients of keys and
    values, or those gradients stacked. With context parallelism that is so for one KV head at a time,
    with its gathered keys and values and those of the next head, fp32 gradients of the local ones, and the
    head's gradients of gathered ones once more stacked and twice in the order of ranks while they are added.
    Of a ring it is all heads of two blocks, fp32 gradients of three, and fp32 gradients of q.
    """
    e, keys = workload.element_size, 2 * shapes.length * shapes.kv
    held = 2 * shapes.s * shapes.q * e
    scores = _score_matrices(shapes, workload)
    if shapes.cp == shapes.ulysses:
        keys = keys // shapes.kv_heads * shapes.attention_kv_heads
        return held + keys * FP32 + max(scores, keys * FP32)
    if shapes.parallel.key_comm == "ring":
        block = keys // shapes.kv_heads * shapes.attention_kv_heads * shapes.ulysses // shapes.cp
        block *= shapes.parallel.ring_node_size
        return (
            held + 2 * block * e + 3 * block * FP32 + shapes.s * shapes.q * FP32 + max(scores, block * FP32)
        )
    heads, group = shapes.attention_kv_heads, keys // shapes.kv_heads
    gathered = 2 * group * e + keys // shapes.cp * FP32 + group * FP32
    return held + gathered + max(scores // heads, 3 * group * FP32)


def _score_matrices(shapes: PackShapes, workload: Workload) -> int:
    """The reference attention's backward, block after block of rows: four fp32 matrices [heads, queries,
    keys] at once (weights, their gradient, two steps of the scores' gradient) and one to three of the block
    before, whose names are assigned one after the other."""
    heads, bounds = shapes.attention_heads, _bounds(shapes, workload)
    layout = _plan(*_layout_of(shapes), bounds)
    worst = 0
    for rank in range(layout.size):
        before = 0
        for part in row_blocks(layout.segments(rank, bounds), causal=True):
            size = heads * (part.q_end - part.q_start) * (part.k_end - part.k_start) * FP32
            worst = max(worst, 3 * before + 2 * size, before + 4 * size)
            before = size
    return worst

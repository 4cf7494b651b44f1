"""Choice of a layout for one pack, and the rules that its sizes must follow.

Ulysses (`ulysses_parallel_size` U) divides heads, not tokens: the layout is planned for context_parallel_size
/ U ranks, and each of their lists is then cut evenly among U ranks, which trade tokens for heads around
attention (`ulysses.py`).
"""

from collections.abc import Sequence
from math import lcm
from typing import Literal, get_args

import numpy as np

from megatron_eagle.context_parallel import layout as layouts
from megatron_eagle.context_parallel.balanced import PairCosts, balanced
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.node_placement import balanced_over_nodes
from megatron_eagle.errors import UserError

LayoutName = Literal["contiguous", "zigzag", "zigzag_per_document", "balanced"]
LAYOUT_NAMES: tuple[str, ...] = get_args(LayoutName)
# Tokens of a chunk of `balanced` unless set, but not fewer than so many chunks a rank. Smaller chunks balance
# no better at 128K tokens, for a cut wastes part of an attention kernel's tile.
CHUNK_SIZE, CHUNKS_PER_RANK = 64, 16
MOST_TOKENS = 2**31 - 1  # of a sequence: attention kernels count positions in int32


def plan_layout(
    name: LayoutName,
    length: int,
    size: int,
    document_bounds: Sequence[int],
    chunk_size: int | None = None,
    *,
    costs: PairCosts,
    node: int | None = None,
) -> SequenceLayout:
    """Divide a pack over `size` ranks.

    Args:
        length: tokens of the pack.
        size: ranks that hold different tokens around attention: context_parallel_size / U.
        document_bounds: 0, the ends of all documents but the last, and `length`.
        chunk_size: of `balanced`; null chooses.
        costs: of the model, for `balanced`.
        node: adjacent ranks that are on one node, for `balanced`; None: all are.

    Raises:
        UserError: a length or a chunk size that does not divide, or documents that do not fill the pack.
    """
    check_documents(length, document_bounds)
    if length % sequence_multiple(name, size, chunk_size=chunk_size):
        raise UserError(
            f"a pack of {length} tokens cannot be divided over {size} ranks by the {name} layout"
            f"{f' in chunks of {chunk_size}' if name == 'balanced' and chunk_size else ''}: "
            f"use a multiple of {sequence_multiple(name, size, chunk_size=chunk_size)}"
        )
    if size == 1 or name == "contiguous":
        return layouts.contiguous(length, size)
    if name == "zigzag":
        return layouts.zigzag(length, size)
    if name == "zigzag_per_document":
        return layouts.zigzag_per_document(length, size, document_bounds)
    chunk_size = chunk_size or default_chunk_size(length // size)
    if node is None or node >= size:
        return balanced(length, size, document_bounds, chunk_size, costs)
    return balanced_over_nodes(length, size, document_bounds, chunk_size, costs, node)


def default_chunk_size(share: int) -> int:
    """Chunk of `balanced` for ranks that hold `share` tokens: the largest good divisor."""
    largest = max(1, min(CHUNK_SIZE, share // CHUNKS_PER_RANK))
    return next(size for size in range(largest, 0, -1) if share % size == 0)


def sequence_multiple(
    name: LayoutName, size: int, ulysses: int = 1, sequence_parallel: int = 1, chunk_size: int | None = None
) -> int:
    """What a pack's length must be a multiple of.

    Args:
        size: ranks that hold different tokens around attention.
        ulysses, sequence_parallel: into how many equal parts each of their lists is cut further.
        chunk_size: of `balanced`.
    """
    chunks = 1
    if size > 1 and name == "zigzag":
        chunks = 2
    elif size > 1 and name == "balanced":
        chunks = chunk_size or 1
    return size * lcm(chunks, ulysses * sequence_parallel)


def check_documents(length: int, document_bounds: Sequence[int]) -> None:
    """
    Raises:
        UserError: bounds that do not run from 0 to `length`, an empty document, or positions beyond int32.
    """
    if length > MOST_TOKENS:
        raise UserError(
            f"a pack of {length} tokens: attention kernels count positions in int32, at most {MOST_TOKENS}"
        )
    bounds = np.asarray(document_bounds)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length:
        raise UserError(
            f"document bounds must run from 0 to the pack's {length} tokens, got {_shown(bounds)}"
        )
    empty = np.flatnonzero(np.diff(bounds) <= 0)
    if len(empty):
        raise UserError(
            f"document {empty[0]} of the pack is empty "
            f"(tokens {bounds[empty[0]]} to {bounds[empty[0] + 1]}): every document needs a token"
        )


def _shown(bounds: np.ndarray) -> str:
    shown = [str(n) for n in bounds.tolist()]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]) or "none"

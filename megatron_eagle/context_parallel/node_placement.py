"""`balanced` over the ranks of several nodes: documents stay inside a node where that balances.

A key from another node costs a multiple of one from the same node. So the pack is divided over nodes first,
and each node's part over its ranks as ever. Two divisions are tried. In one whole documents are dealt to
nodes, the one with most work first, each to the node that has the least so far and room for it; only those
that fit nowhere are cut. The other halves the nodes by windows of a list of chunks, as `balanced` halves
ranks, but with the longest documents first: windows then end in short ones or between long ones. Of both,
and of what takes no notice of nodes, that is taken which has the least work on the busiest rank and keys
into the node that receives most, among those that balance.
"""

from collections.abc import Sequence

import numpy as np

from megatron_eagle.context_parallel.balanced import PackChunks, PairCosts
from megatron_eagle.context_parallel.layout import SequenceLayout


def balanced_over_nodes(
    length: int, size: int, document_bounds: Sequence[int], chunk_size: int, costs: PairCosts, node: int
) -> SequenceLayout:
    """As `balanced`, over `size` ranks of which `node` adjacent ones are on one node, a divisor."""
    pack = PackChunks.of(length, size, document_bounds, chunk_size, costs)
    everything, nodes = np.arange(len(pack.work)), size // node
    longest_first = np.argsort(-np.diff(document_bounds)[pack.document], kind="stable")
    divided = [_deal_documents(pack, nodes), _halve_nodes(pack, everything[longest_first], nodes)]
    without_nodes = pack.bisect(everything, size)
    candidates = [without_nodes]
    for parts in divided:
        parts = sorted((np.sort(part) for part in parts), key=lambda part: int(part[0]))
        candidates.append([held for part in parts for held in pack.bisect(part, node)])
    limit = max(pack.limit, pack.heaviest(without_nodes))
    balanced = [placed for placed in candidates if pack.heaviest(placed) <= limit]

    def cost(placed: Sequence[np.ndarray]) -> int:
        return pack.heaviest(placed) + costs.far_key * _far_keys(pack, placed, node)

    return pack.layout(min(balanced, key=cost))


def _deal_documents(pack: PackChunks, nodes: int) -> list[np.ndarray]:
    """Whole documents to nodes of equally many chunks."""
    first = np.flatnonzero(np.diff(pack.document, prepend=-1))
    counts = np.diff(first, append=len(pack.document))
    work = np.add.reduceat(pack.work, first)
    room, load = [len(pack.document) // nodes] * nodes, [0] * nodes
    held: list[list[np.ndarray]] = [[] for _ in range(nodes)]
    left_over = []
    for place in np.argsort(-work, kind="stable").tolist():
        count = int(counts[place])
        chunks = np.arange(first[place], first[place] + count)
        roomy = [node for node in range(nodes) if room[node] >= count]
        if roomy:
            node = min(roomy, key=load.__getitem__)
            held[node].append(chunks)
            load[node] += int(work[place])
            room[node] -= count
        else:
            left_over.append(chunks)
    for chunks in left_over:
        while len(chunks):
            node = max(range(nodes), key=room.__getitem__)
            cut = max(len(chunks) - room[node], 0)
            held[node].append(chunks[cut:])
            room[node] -= len(chunks) - cut
            chunks = chunks[:cut]
    return [np.concatenate(parts) for parts in held]


def _halve_nodes(pack: PackChunks, chunks: np.ndarray, nodes: int) -> list[np.ndarray]:
    """Divide a list of chunks over nodes, window by window."""
    if nodes == 1:
        return [chunks]
    halves = pack.halve(chunks, nodes, nodes // 2, pack.costs.far_key)
    return [held for part, number in halves for held in _halve_nodes(pack, part, number)]


def _far_keys(pack: PackChunks, placed: Sequence[np.ndarray], node: int) -> int:
    """Keys that the node which receives most has from others, to a chunk."""
    size, most = int(pack.starts[1]), 0
    for first in range(0, len(placed), node):
        chunks = np.sort(np.concatenate(placed[first : first + node]))
        document = pack.document[chunks]
        last = np.append(document[1:] != document[:-1], True)
        needed = int((pack.foreign[chunks[last]] + size).sum())
        most = max(most, needed - len(chunks) * size)
    return most

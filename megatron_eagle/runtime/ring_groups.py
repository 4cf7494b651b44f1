"""Process groups of the ring that keys go round (`context_parallel/ring.py`)."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator


@dataclass(frozen=True)
class RingGroups:
    """The ranks of a ring, with a communicator of their own, and those of a node that gather each block."""

    ring: dist.ProcessGroup | None  # None: keys do not go round
    node: dist.ProcessGroup | None = None  # None: a block is what one rank holds


def make_ring_groups(tensor: int, pipeline: int, context: int, ulysses: int, node: int) -> RingGroups:
    """This process's groups. Collective over all ranks, which make all groups in the same order.

    Of the context parallel ranks, those that divide heads are adjacent, then come those of a node, then the
    nodes. Messages of a ring must not queue up behind the collectives of other groups of the same ranks, so
    that these are no groups of Megatron's.

    Args:
        tensor, pipeline, context: sizes of Megatron's axes.
        ulysses, node: ranks that divide heads, and those that gather blocks; context is a multiple of both
            together.
    """
    data = dist.get_world_size() // (tensor * pipeline * context)
    generator = RankGenerator(tensor, 1, data, pipeline, context, "tp-cp-ep-dp-pp")  # Megatron's order
    rings, nodes = [], []
    for ranks in generator.get_ranks("cp"):
        for head in range(ulysses):
            keys = ranks[head::ulysses]
            rings += [keys[place::node] for place in range(node)]
            nodes += [keys[start : start + node] for start in range(0, len(keys), node)]
    ring = _own_group(rings, "ring")
    return RingGroups(ring, _own_group(nodes, "ring_node") if node > 1 else None)


def _own_group(groups: list[list[int]], name: str) -> dist.ProcessGroup:
    own: dist.ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(ranks, group_desc=name)
        if dist.get_rank() in ranks:
            own = group
    assert own is not None, "every rank has a place"
    return own

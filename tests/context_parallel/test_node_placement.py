"""Placement over several nodes: as even as ever, and fewer keys from other nodes."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.context_parallel.balanced import TOLERANCE, PairCosts, causal_area
from megatron_eagle.context_parallel.exchange import measure_traffic
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.planning import plan_layout

COSTS = PairCosts(token=2048, key=54, far_key=816)


def documents(seed: int, length: int, mean: float) -> list[int]:
    generator, bounds = random.Random(seed), [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + max(1, int(generator.lognormvariate(mean, 1.2)))))
    return bounds


def busiest(layout: SequenceLayout, bounds: list[int]) -> float:
    """Work of the busiest rank over the mean."""
    loads = [
        int(np.diff(causal_area(own, bounds)).sum()) + COSTS.token * int(np.diff(own).sum())
        for own in layout.ranges
    ]
    return max(loads) / (sum(loads) / len(loads))


@given(
    st.sampled_from([(8, 4), (8, 2), (4, 1), (12, 4), (6, 2)]), st.integers(0, 10_000), st.floats(3.0, 9.0)
)
@settings(max_examples=60, deadline=None)
def test_every_pack_is_as_even_as_on_one_node_or_within_tolerance(sizes, seed, mean):
    size, node = sizes
    bounds = documents(seed, 12288, mean)
    one = plan_layout("balanced", 12288, size, bounds, 32, costs=COSTS)
    layout = plan_layout("balanced", 12288, size, bounds, 32, costs=COSTS, node=node)
    assert layout.rank_major_order.sort().values.tolist() == list(range(12288))
    assert {len(layout.token_index(rank)) for rank in range(size)} == {12288 // size}
    assert busiest(layout, bounds) <= max(1 + TOLERANCE, busiest(one, bounds)) + 1e-9
    again = plan_layout("balanced", 12288, size, bounds, 32, costs=COSTS, node=node)
    assert [own.tolist() for own in layout.ranges] == [own.tolist() for own in again.ranges]


def test_one_node_is_no_change():
    for seed in range(5):
        bounds = documents(seed, 16384, 6)
        layouts = [plan_layout("balanced", 16384, 8, bounds, costs=COSTS, node=n) for n in (None, 8, 16)]
        for other in layouts[1:]:
            assert [own.tolist() for own in other.ranges] == [own.tolist() for own in layouts[0].ranges]


@pytest.mark.parametrize(("ranks", "packs", "share"), [(2, 8, 0.1), (4, 8, 0.7), (4, 4, 0.7)])
def test_fewer_keys_come_from_other_nodes(ranks, packs, share):
    """Packs of 8192 tokens end to end, so many ranks each, in nodes of eight: `share` at most of the keys
    that the placement without nodes has from other nodes, over twenty sequences."""
    far = {None: 0, 8: 0}
    for seed in range(20):
        bounds = [0]
        for pack in range(packs):
            own = documents(100 * seed + pack, 8192, 7.0)
            bounds += [pack * 8192 + end for end in own[1:]]
        for node in far:
            layout = plan_layout("balanced", packs * 8192, packs * ranks, bounds, costs=COSTS, node=node)
            far[node] += int(measure_traffic(layout, bounds).from_nodes(8).received.max())
    assert far[None] > 20 * 1000 and far[8] <= share * far[None], far[8] / far[None]


def test_documents_that_fill_nodes_are_not_cut():
    """Four documents, each as long as a node's part, in an order in which halving would part them."""
    sizes = [4096, 1024, 1024, 2048, 4096, 1024, 1024, 2048]
    bounds = [0, *np.cumsum(sizes).tolist()]
    layout = plan_layout("balanced", 16384, 8, bounds, costs=COSTS, node=4)
    assert measure_traffic(layout, bounds).from_nodes(4).received.max() == 0
    assert busiest(layout, bounds) < 1.01

"""How a pack's keys travel: what `auto` counts, and what it takes where."""

import time
from dataclasses import astuple

import numpy as np
import pytest

from megatron_eagle.context_parallel.balanced import PairCosts
from megatron_eagle.context_parallel.exchange import measure_traffic
from megatron_eagle.context_parallel.exchange_choice import (
    Estimate,
    ExchangeCosts,
    KeyUse,
    choose_exchange,
    estimate,
    kept_keys,
    pairs_by_block,
    plan_keys,
)
from megatron_eagle.context_parallel.planning import LAYOUT_NAMES, plan_layout
from megatron_eagle.model.flops import exchange_costs
from megatron_eagle.model.presets import preset
from megatron_eagle.runtime.parallel import ParallelConfig

COSTS = PairCosts(token=16384, key=64, far_key=1024)
MODEL = preset("eagle2.5-8b").complete()
WHOLE = [0, 131072]
CHAT = [*range(0, 131072, 1024), 131072]
UNEVEN = [0, 98304, 131072]


def choice(
    layout: str,
    bounds: list[int],
    size: int,
    comm: str = "auto",
    costs: ExchangeCosts | None = None,
    **parallel,
) -> str:
    """Of the 8B model, in nodes of eight ranks."""
    costs = costs or exchange_costs(MODEL, ParallelConfig(context_parallel_size=size, **parallel), 8)
    layout = plan_layout(layout, bounds[-1], size, bounds, costs=COSTS)
    return choose_exchange(layout, bounds, measure_traffic(layout, bounds), comm, costs)


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@pytest.mark.parametrize("bounds", [[0, 96], [0, 1, 2, 30, 71, 95, 96], [*range(0, 97, 6)]])
def test_pairs_are_those_of_the_mask(name, bounds):
    layout = plan_layout(name, 96, 4, bounds, costs=COSTS)
    tokens = np.arange(96)
    document = np.searchsorted(bounds, tokens, side="right")
    seen = (document[:, None] == document) & (tokens <= tokens[:, None])
    held = [layout.token_index(rank).numpy() for rank in range(4)]
    expected = [[seen[np.ix_(queries, keys)].sum() for keys in held] for queries in held]
    assert pairs_by_block(layout, bounds).tolist() == expected


def test_what_is_asked_for_is_taken_where_keys_travel_at_all():
    for comm in ("gather", "ranges", "ring"):
        assert choice("zigzag", WHOLE, 4, comm) == comm
        assert choice("contiguous", [0, 65536, 131072], 2, comm) == "none"


def test_auto_takes_what_suits_the_pack_and_the_links():
    """Inside a node gathering is hidden; across nodes its first head is not, and even steps of a ring are
    better; uneven steps are not; the needed ranges where few are."""
    assert choice("zigzag", WHOLE, 8) == choice("balanced", WHOLE, 8) == "gather"
    assert choice("zigzag", WHOLE, 32) == "ring"
    assert choice("contiguous", WHOLE, 8) == "gather"
    assert choice("balanced", CHAT, 8) in ("none", "ranges")
    assert choice("zigzag_per_document", WHOLE, 4, tensor_model_parallel_size=4) == "ring"


def test_gathered_keys_have_a_bound():
    few = ExchangeCosts(key=0, far_key=0, node=4, step=10**9, merge=1, head_groups=4, most_keys=1000)
    layout = plan_layout("zigzag", 4096, 4, [0, 4096], costs=COSTS)
    traffic = measure_traffic(layout, [0, 4096])
    assert [kept_keys(kind, layout, traffic) for kind in ("gather", "ranges", "ring")] == [4096, 4096, 2048]
    assert choose_exchange(layout, [0, 4096], traffic, "auto", few) == "ring"
    assert exchange_costs(MODEL, ParallelConfig(), 8).most_keys == int(4e9 / (2 * 128 * 20))


def test_estimates_are_whole_numbers():
    """So that all ranks have the same. By hand, for one document over two ranks of zigzag."""
    layout = plan_layout("zigzag", 8, 2, [0, 8], costs=COSTS)
    costs = ExchangeCosts(key=7, far_key=9, node=2, step=100, merge=3, head_groups=2, most_keys=8)
    found = estimate(layout, [0, 8], measure_traffic(layout, [0, 8]), costs)
    assert pairs_by_block(layout, [0, 8]).tolist() == [[10, 8], [8, 10]]
    assert found == {
        "gather": Estimate(18 + 14, 14),  # half of four keys' 28; the other half is hidden
        "ranges": Estimate(18 + 28 + (28 - 18), 38),  # messages take twice as long, and are not all hidden
        "ring": Estimate(28 + 8 + 2 * 100 + 4 * 3, 28 - 10),  # the transfer takes longer than the first step
    }
    assert all(type(number) is int for each in found.values() for number in astuple(each))


def test_what_the_keys_of_a_pack_amount_to():
    """Of zigzag, one rank sees four keys of the other, and that two; none where documents end with ranks."""
    costs = ExchangeCosts(key=7, far_key=7, node=2, step=100, merge=3, head_groups=2, most_keys=8)
    layout = plan_layout("zigzag", 8, 2, [0, 8], costs=COSTS)
    for rank in (0, 1):
        use, exchange = plan_keys(layout, rank, [0, 8], "auto", costs)
        assert use == KeyUse("gather", 14, 6, 32, 14) and exchange.kind == "gather"
        assert plan_keys(layout, rank, [0, 8], "ring", costs)[0] == KeyUse("ring", 14, 6, 248, 18)
    apart = plan_layout("contiguous", 8, 2, [0, 4, 8], costs=COSTS)
    assert plan_keys(apart, 0, [0, 4, 8], "ring", costs)[0] == KeyUse("none", 8, 0, 10, 0)


def test_a_ring_of_nodes_is_counted_as_one():
    """One document over two nodes of two ranks of zigzag: 18 pairs of a rank with its node's block, 16 with
    the other. Nothing hides the first gathering; the transfer takes longer than the first step."""
    costs = ExchangeCosts(key=1, far_key=7, node=2, step=100, merge=3, head_groups=2, most_keys=8)
    layout = plan_layout("zigzag", 16, 4, [0, 16], costs=COSTS)
    for rank in range(4):
        use, _ = plan_keys(layout, rank, [0, 16], "ring", costs, 2)
        assert (use.pairs, use.exposed) == (4 + 28 + 16 + 2 * 100 + 4 * 3, 4 + 28 - 18)


def test_a_choice_takes_milliseconds():
    """128K tokens, 500 documents, 16 ranks: below 60 ms of CPU time."""
    generator = np.random.default_rng(0)
    bounds = [0, *sorted(generator.choice(np.arange(1, 131072), 499, replace=False).tolist()), 131072]
    layout = plan_layout("balanced", 131072, 16, bounds, costs=COSTS)
    traffic = measure_traffic(layout, bounds)
    costs = exchange_costs(MODEL, ParallelConfig(context_parallel_size=16), 8)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        choose_exchange(layout, bounds, traffic, "auto", costs)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.06


def test_keys_are_counted_by_where_they_come_from():
    """Two nodes of two ranks: of one document's keys, all before a rank's own, and those of other nodes."""
    layout = plan_layout("contiguous", 64, 4, [0, 48, 64], costs=COSTS)
    traffic = measure_traffic(layout, [0, 48, 64])
    assert traffic.keys.tolist() == [[16, 0, 0, 0], [16, 16, 0, 0], [16, 16, 16, 0], [0, 0, 0, 16]]
    far = traffic.from_nodes(2)
    assert (far.received.tolist(), far.sent.tolist()) == ([0, 0, 32, 0], [16, 16, 0, 0])


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_keys_are_those_that_are_needed(name):
    generator = np.random.default_rng(1)
    bounds = [0, *sorted(generator.choice(np.arange(1, 960), 20, replace=False).tolist()), 960]
    layout = plan_layout(name, 960, 6, bounds, costs=COSTS)
    traffic = measure_traffic(layout, bounds)
    held = traffic.needed[:, layout.rank_major_order.numpy()].reshape(6, 6, -1).sum(axis=2)
    assert np.array_equal(traffic.keys, held)


def test_keys_of_other_nodes_cost_the_network():
    """The same pack and layout; only what is sent across differs."""
    layout = plan_layout("contiguous", 64, 4, [0, 32, 48, 64], costs=COSTS)
    traffic, found = measure_traffic(layout, [0, 32, 48, 64]), {}
    for node in (4, 2, 1):
        costs = ExchangeCosts(1000, far_key=5000, node=node, step=1, merge=1, head_groups=2, most_keys=64)
        found[node] = estimate(layout, [0, 32, 48, 64], traffic, costs)
    assert found[4]["ranges"] == found[2]["ranges"] < found[1]["ranges"]  # keys of one document stay inside
    assert found[4]["gather"] < found[2]["gather"] == found[1]["gather"]
    assert found[4]["ring"] < found[2]["ring"] == found[1]["ring"]


@pytest.mark.parametrize(
    ("sizes", "ranks_per_node", "node"),
    [
        ((1, 16, 1), 8, 8),
        ((2, 16, 2), 8, 2),
        ((1, 4, 1), 8, 4),
        ((1, 4, 4), 8, 1),
        ((4, 16, 2), 8, 1),
        ((1, 12, 1), 8, 1),  # the second group begins in the middle of a node
        ((1, 6, 1), 8, 1),  # and so it does here, two ranks before a node's end
        ((1, 6, 1), 12, 6),
        ((8, 4, 2), 8, 1),
    ],
)
def test_ranks_of_a_node_that_exchange_keys(sizes, ranks_per_node, node):
    tensor, context, ulysses = sizes
    config = ParallelConfig(
        tensor_model_parallel_size=tensor, context_parallel_size=context, ulysses_parallel_size=ulysses
    )
    assert config.key_ranks_per_node(ranks_per_node) == node

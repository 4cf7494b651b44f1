"""Context parallel layouts: every token once, every visible key exactly once, equal shares."""

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.context_parallel import balanced as balanced_layout
from megatron_eagle.context_parallel.balanced import PairCosts, balanced, causal_area
from megatron_eagle.context_parallel.layout import SequenceLayout, expand, merge_adjacent, zigzag
from megatron_eagle.context_parallel.planning import LAYOUT_NAMES, plan_layout, sequence_multiple
from megatron_eagle.errors import UserError

COSTS = PairCosts(token=16384, key=64, far_key=1024)


def visible_pairs(layout: SequenceLayout, bounds: list[int]) -> torch.Tensor:
    """[length, length] how often query token i attends to key token j, from all ranks' segments."""
    seen = torch.zeros(layout.length, layout.length, dtype=torch.int)
    for rank in range(layout.size):
        tokens = layout.token_index(rank)
        for part in layout.segments(rank, bounds):
            rows, keys = part.q_end - part.q_start, part.k_end - part.k_start
            mask = torch.ones(rows, keys, dtype=torch.int).tril(keys - rows)
            seen[tokens[part.q_start : part.q_end], part.k_start : part.k_end] += mask
    return seen


def work(layout: SequenceLayout, bounds: list[int]) -> list[int]:
    """Query-key pairs of each rank."""
    areas = np.diff(causal_area(np.arange(layout.length + 1), bounds))
    return [int(areas[layout.token_index(rank).numpy()].sum()) for rank in range(layout.size)]


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 5, 8]), st.integers(1, 4), st.sampled_from([1, 2, 3]), st.data())
def test_every_layout_covers_the_block_causal_mask_in_equal_shares(name, size, chunk, ulysses, data):
    length = 2 * size * chunk * ulysses
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=12))
    bounds = [0, *sorted(cuts), length]
    layout = plan_layout(
        name, length, size, bounds, chunk_size=data.draw(st.sampled_from([None, 1, 2])), costs=COSTS
    )

    document = torch.bucketize(torch.arange(length), torch.tensor(bounds[1:]), right=True)
    expected = (document[:, None] == document[None]).int().tril()
    assert torch.equal(visible_pairs(layout, bounds), expected)

    assert layout.rank_major_order.sort().values.tolist() == list(range(length))
    assert {len(layout.token_index(rank)) for rank in range(size)} == {length // size}

    cut = layout.cut_each(ulysses)
    assert cut.size == size * ulysses
    assert torch.equal(cut.rank_major_order, layout.rank_major_order)
    assert {len(cut.token_index(rank)) for rank in range(cut.size)} == {length // cut.size}


@pytest.mark.parametrize("name", ["zigzag", "zigzag_per_document", "balanced"])
def test_one_long_document_is_divided_equally(name):
    layout = plan_layout(name, 65536, 4, [0, 65536], costs=COSTS)
    assert set(work(layout, [0, 65536])) == {65536 * 65537 // 2 // 4}


@given(st.sampled_from([2, 4, 8]), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_balanced_keeps_within_five_percent(size, seed):
    """Attention and the rest together, documents of any mix."""
    generator, length, bounds = random.Random(seed), 16384, [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + max(1, int(generator.lognormvariate(6, 1.5)))))
    layout = balanced(length, size, bounds, chunk_size=16, costs=PairCosts(2048, key=64, far_key=1024))
    loads = [area + 2048 * length // size for area in work(layout, bounds)]
    assert max(loads) <= 1.05 * sum(loads) / size


def test_chunks_too_large_for_windows_are_dealt_by_weight(monkeypatch):
    """Without longest-processing-time the busiest rank would have 18 % more than the mean."""
    bounds, excess = [0, 98304, 131072], []
    for tolerance in (balanced_layout.TOLERANCE, 10):
        monkeypatch.setattr(balanced_layout, "TOLERANCE", tolerance)
        areas = work(balanced(131072, 16, bounds, chunk_size=2048, costs=COSTS), bounds)
        loads = [area + COSTS.token * 131072 // 16 for area in areas]
        excess.append(max(loads) / (sum(loads) / 16) - 1)
    assert excess[0] < 0.04 and excess[1] > 0.17


@pytest.mark.parametrize(
    ("size", "bounds", "runs"),
    [
        (3, [0, 1536], 5),
        (5, [0, 2560], 9),
        (6, [0, 3072], 11),
        (3, [0, 370, 1536], 6),
        (5, [0, 1280, 2560], 70),
    ],
)
def test_ranks_that_cannot_be_halved_equally(size, bounds, runs):
    """Windows balance in few runs; only where they do not, as in the last case, are chunks dealt out."""
    layout = balanced(bounds[-1], size, bounds, chunk_size=16, costs=PairCosts(64, key=64, far_key=1024))
    loads = [area + 64 * bounds[-1] // size for area in work(layout, bounds)]
    assert max(loads) <= 1.04 * sum(loads) / size
    assert sum(len(layout.segments(rank, bounds)) for rank in range(size)) == runs


def test_short_documents_stay_together():
    """A document is cut at most where a rank's share begins or ends."""
    bounds = list(range(0, 4096 + 1, 64))
    layout = balanced(4096, 8, bounds, chunk_size=16, costs=COSTS)
    assert sum(len(layout.segments(rank, bounds)) for rank in range(8)) == 64


def test_layouts_are_planned_in_milliseconds():
    """128K tokens, 500 documents, 16 ranks: below 10 ms of CPU time."""
    generator = np.random.default_rng(0)
    bounds = [0, *sorted(generator.choice(np.arange(1, 131072), 499, replace=False).tolist()), 131072]
    for name in LAYOUT_NAMES:
        seconds = []
        for _ in range(5):
            start = time.process_time()
            layout = plan_layout(name, 131072, 16, bounds, costs=COSTS)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.01, name
        again = plan_layout(name, 131072, 16, bounds, costs=COSTS)
        assert torch.equal(layout.rank_major_order, again.rank_major_order), name


def test_ranges():
    ranges = np.array([[3, 5], [5, 5], [5, 9], [0, 2]])
    assert merge_adjacent(ranges).tolist() == [[3, 9], [0, 2]]
    assert expand(ranges).tolist() == [3, 4, 5, 6, 7, 8, 0, 1]
    assert expand(ranges[:0]).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zigzag", 60, 4, [0, 60]), "pack of 60 tokens .* over 4 ranks by the zigzag .* multiple of 8"),
        (("balanced", 62, 4, [0, 62]), "multiple of 4"),
        (("balanced", 64, 128, [0, 64]), "64 tokens .* over 128 ranks .* use a multiple of 128"),
        (("zigzag", 8, 8, [0, 8]), "8 tokens .* over 8 ranks .* use a multiple of 16"),
        (("balanced", 64, 4, [0, 64], 32), "in chunks of 32: use a multiple of 128"),
        (("zigzag", 64, 4, [0, 10, 10, 64]), r"document 1 of the pack is empty \(tokens 10 to 10\)"),
        (("zigzag", 64, 4, [0, 12, 10, 64]), "document 1 of the pack is empty"),
        (("zigzag", 64, 4, [0, 63]), "must run from 0 to the pack's 64 tokens, got 0, 63"),
        (("zigzag", 2**31, 4, [0, 2**31]), "int32"),
    ],
)
def test_impossible_packs_name_the_rule(arguments, message):
    with pytest.raises(UserError, match=message):
        plan_layout(*arguments, costs=COSTS)


def test_zigzag_names_its_own_rule():
    with pytest.raises(UserError, match="multiple of 8"):
        zigzag(60, 4)


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_the_rule_for_lengths_is_the_smallest(name):
    for size, ulysses, sequence_parallel in [(1, 1, 2), (2, 2, 2), (3, 1, 4), (4, 2, 1)]:
        multiple = sequence_multiple(name, size, ulysses, sequence_parallel)
        layout = plan_layout(name, multiple, size, [0, multiple], costs=COSTS).cut_each(ulysses)
        assert len(layout.token_index(layout.size - 1)) % sequence_parallel == 0

"""Context parallel layouts: every token once, every visible key exactly once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_eagle.context_parallel.layout import SequenceLayout, zigzag
from megatron_eagle.errors import UserError


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


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.data())
def test_segments_are_the_block_causal_mask(size, chunk, data):
    length = 2 * size * chunk
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else set()
    bounds = [0, *sorted(cuts), length]
    document = torch.zeros(length, dtype=torch.int)
    for cut in cuts:
        document[cut:] += 1
    expected = (document[:, None] == document[None]).int().tril()
    assert torch.equal(visible_pairs(zigzag(length, size), bounds), expected)


def test_zigzag_is_a_permutation_with_equal_causal_area():
    layout = zigzag(64, 4)
    assert layout.rank_major_order.sort().values.tolist() == list(range(64))
    assert torch.equal(layout.rank_major_order[layout.natural_order], torch.arange(64))
    areas = {int((layout.token_index(rank) + 1).sum()) for rank in range(4)}
    assert len(areas) == 1


def test_indivisible_length_names_the_rule():
    with pytest.raises(UserError, match="multiple of 8"):
        zigzag(60, 4)

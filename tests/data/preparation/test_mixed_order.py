"""Every stretch of a store that training may follow mixes the data sets as the whole does."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.preparation.mixed_order import RowNumbers, match, mixed_takes

SOURCES = st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=5)


@st.composite
def mixtures(draw):
    copies = [np.array(counts, np.int64) for counts in draw(SOURCES)]
    return [draw(st.sampled_from("abc")) for _ in copies], copies


@settings(max_examples=25, deadline=None)
@given(mixtures())
def test_every_line_is_taken_as_often_as_the_recipe_says(mixture):
    names, copies = mixture
    takes = mixed_takes(names, copies)
    assert len(takes) == sum(map(np.sum, copies))
    for source, counts in enumerate(copies):
        own = takes.lines[takes.sources == source]
        assert np.array_equal(np.bincount(own, minlength=len(counts)), counts)
    pairs = list(zip(takes.sources.tolist(), takes.lines.tolist(), strict=True))
    assert [pair not in pairs[:i] for i, pair in enumerate(pairs)] == takes.first.tolist()
    assert list(takes.new_lines()) == [pair for pair, first in zip(pairs, takes.first, strict=True) if first]


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(0, 150), st.integers(0, 150))
def test_every_stretch_has_its_share_of_each_data_set(mixture, begin, size):
    names, copies = mixture
    takes = mixed_takes(names, copies)
    part = takes.part(begin, begin + size)
    of_source = np.array([sorted(set(names)).index(name) for name in names])
    for number, _ in enumerate(sorted(set(names))):
        whole = (of_source[takes.sources] == number).sum() if len(takes) else 0
        found = (of_source[part.sources] == number).sum() if len(part) else 0
        assert abs(found - len(part) * whole / max(1, len(takes))) <= 1 + len(set(names))


def test_the_order_of_the_input_would_fail_it():
    """The control: data sets one after the other."""
    takes = mixed_takes(["a"], [np.ones(100, np.int64)])
    assert takes.lines.tolist() == list(range(100))
    mixed = mixed_takes(["a", "b"], [np.ones(100, np.int64), np.ones(100, np.int64)])
    assert (mixed.sources[:100] == 0).sum() == 50  # and not 100


def test_what_is_repeated_comes_after_all_of_its_data_set():
    takes = mixed_takes(["a", "b"], [np.array([2, 2, 1]), np.array([1, 1, 1, 1, 1])])
    assert takes.lines[takes.sources == 0].tolist() == [0, 1, 2, 0, 1]


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.data())
def test_rows_of_some_lines_that_were_dropped(mixture, data):
    """Against an oracle that knows every line's number."""
    takes = mixed_takes(*mixture)
    lines = takes.new_lines()
    kept = [line for line in lines if data.draw(st.booleans())]
    sources, numbers = (np.array([pair[i] for pair in kept], np.int64) + i for i in (0, 1))
    rows = RowNumbers(takes, [len(counts) for counts in mixture[1]])
    rows.add(sources, numbers, 0)
    number = {line: i for i, line in enumerate(kept)}
    pairs = zip(takes.sources.tolist(), takes.lines.tolist(), strict=True)
    expected = [number[pair] for pair in pairs if pair in number]
    assert rows.of(0, len(takes), match(takes, sources, numbers, 0)).tolist() == expected

"""Packs hold every row once, never too much, are nearly full and cost nearly the same."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eagle.data.loading.loader import DataConfig
from megatron_eagle.data.packing.balance import assign, deal, pack_costs
from megatron_eagle.data.packing.best_fit import pack_rows
from megatron_eagle.data.packing.index import read_packs, write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.planning.planner import PackShape
from tests.data.helpers import call_tool, conversation, make_store


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(0, 5))
def test_every_row_is_in_one_pack(lengths, seed):
    lengths = np.array(lengths, np.int64)
    packs = pack_rows(lengths, 600, seed)
    assert sorted(packs.rows.tolist()) == list(range(len(lengths)))
    totals = packs.sums(lengths).tolist()
    assert totals == [lengths[pack].sum() for pack in packs]
    assert all(0 < total <= 600 for total in totals)
    # Any two packs would overflow together: best fit never opens a pack that it could have done without.
    assert all(a + b > 600 for i, a in enumerate(totals) for b in totals[:i])


def mix(n, seed=0):
    """Text, pictures of 1 to 13 tiles, clips of 8 to 24 frames: tokens and tiles."""
    generator = np.random.default_rng(seed)
    kind = generator.choice(3, n, p=[0.25, 0.5, 0.25])
    tiles = np.choose(kind, [0, generator.integers(1, 14, n), generator.integers(8, 25, n)])
    return generator.integers(50, 1500, n) + 256 * tiles, tiles


@pytest.mark.parametrize(("n", "fill"), [(2000, 0.99), (20_000, 0.999)])
def test_packs_are_full(n, fill):
    lengths, tiles = mix(n)
    assert lengths.sum() / (len(pack_rows(lengths, 32768, 0, tiles=tiles)) * 32768) > fill
    # Also what cannot be dealt evenly: most rows fill more than half a pack.
    large = np.random.default_rng(1).integers(6000, 32769, n)
    assert len(pack_rows(large, 32768, 0)) < 1.03 * (large > 16384).sum()


@pytest.mark.parametrize("per_rank", [1, 8])
def test_ranks_have_the_same_to_do_and_every_step_is_mixed(per_rank):
    """20,000 samples, data parallel 8: at most 5 % over the mean in 95 % of steps."""
    lengths, tiles = mix(20_000)
    packs = pack_rows(lengths, 32768, 0, tiles=tiles)
    squares, patches = packs.sums(lengths**2), 1024 * packs.sums(tiles)
    order = np.random.default_rng([0, 0]).permutation(len(packs))
    steps = order[: len(order) // (8 * per_rank) * 8 * per_rank].reshape(-1, 8 * per_rank)
    for costs in (pack_costs(squares, patches, 4800.0), squares + patches):
        loads = np.array([[costs[step[own]].sum() for own in assign(costs[step], 8)] for step in steps])
        assert (loads.max(1) <= 1.05 * loads.mean(1)).mean() >= 0.95
    short = packs.sums((lengths < 2048).astype(np.int64)) / np.diff(packs.starts)
    share = np.array([short[step].mean() for step in steps])
    assert (lengths < 2048).mean() * 0.9 < np.median(share) < (lengths < 2048).mean() * 1.1
    assert np.quantile(share, 0.05) > 0.8 * np.median(share)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30), st.integers(1, 6))
def test_assignment_gives_every_pack_to_one_rank(costs, size):
    costs = np.array(costs[: len(costs) // size * size])
    parts = assign(costs, size)
    assert len(parts) == size
    assert {len(part) for part in parts} == {len(costs) // size}
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))


def spread(costs: np.ndarray, size: int) -> list[np.ndarray]:
    """As `assign`, from its words: to the rank that has least, of equals the first."""
    ranks, loads = [[] for _ in range(size)], np.zeros(size)
    for position in sorted(range(len(costs)), key=lambda place: -costs[place]):
        open_ranks = [rank for rank in range(size) if len(ranks[rank]) < len(costs) // size]
        rank = min(open_ranks, key=lambda rank: loads[rank])
        ranks[rank].append(position)
        loads[rank] += costs[position]
    return [np.sort(rank) for rank in ranks]


@given(st.lists(st.integers(0, 9), min_size=4, max_size=40), st.sampled_from([1, 2, 4]))
def test_one_pack_a_sequence_is_what_assign_does(costs, size):
    costs = np.array(costs[: len(costs) // size * size], np.float64)
    expected = [rank.tolist() for rank in spread(costs, size)]
    assert [rank.tolist() for rank in assign(costs, size)] == expected
    assert [[int(place) for [place] in group] for group in deal(costs, size)] == expected


@given(
    st.lists(st.floats(0, 1e9), min_size=12, max_size=48), st.sampled_from([1, 2, 3]), st.sampled_from([2, 4])
)
def test_every_group_gets_as_many_sequences_of_as_many_packs(costs, groups, packs):
    costs = np.array(costs[: len(costs) // 24 * 24] or costs[:12] * 2)
    found = deal(costs, groups, packs)
    places = [place for group in found for sequence in group for place in sequence.tolist()]
    assert {len(group) for group in found} == {len(costs) // groups // packs}
    assert {len(sequence) for group in found for sequence in group} == {packs}
    assert sorted(places) == list(range(len(costs)))
    for group in found:
        assert all((np.diff(sequence) > 0).all() for sequence in group), "in the global order"
        assert [sequence[0] for sequence in group] == sorted(sequence[0] for sequence in group)


def test_sequences_of_several_packs_differ_less():
    """The costliest rank over the mean of a step: the more packs share their ranks, the less it is."""
    costs, worst = np.random.default_rng(0).lognormal(0, 1, (200, 16)), []
    for packs in (1, 2, 4, 8):
        busiest = [
            max(sum(step[sequence].sum() for sequence in group) for group in deal(step, 16 // packs, packs))
            for step in costs
        ]
        worst.append(np.mean(np.array(busiest) / packs / costs.mean(1)))
    assert worst == sorted(worst, reverse=True) and worst[-1] < 1.1 < worst[0], worst


def test_seed_decides_the_composition():
    lengths, tiles = mix(500)
    first, again, other = (pack_rows(lengths, 32768, seed, tiles=tiles).rows.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_row_longer_than_a_pack_is_an_error():
    with pytest.raises(UserError, match="row 1 has 601 tokens, more than a pack of 600"):
        pack_rows(np.array([5, 601]), 600, 0)


def test_index_and_its_mistakes(tmp_path, tokenizer_dir):
    records = [conversation("Hi", "Yes " * k) for k in range(1, 9)]
    path = make_store(tmp_path, tokenizer_dir, records, (128, 256))
    store = SampleStore(path, 128)
    with pytest.raises(UserError, match="has no packs for length 128; run pack_data"):
        read_packs(store)
    report = write_packs(path, 128, seed=3)
    index = read_packs(store)
    assert (report.n_rows, report.n_packs) == (8, len(index))
    packs = np.arange(len(index))
    assert index.column("n_tokens", packs).sum() == sum(store[i].n_tokens for i in range(8))
    expected = [sum(store[r].n_supervised ** 0.5 for r in index.rows(p)) for p in packs]
    np.testing.assert_allclose(index.column("sum_sqrt", packs), expected)
    expected = [sum(store[r].n_tokens ** 2 for r in index.rows(p)) for p in packs]
    assert index.column("sum_squares", packs).tolist() == expected

    done = call_tool("pack_data", "--data", path, "--length", 256)
    assert done.returncode == 0
    assert "8 samples in" in done.stdout
    assert "% full" in done.stdout
    wrong = call_tool("pack_data", "--data", path, "--length", 100)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"error: {path} has no plan for length 100; it has 128, 256\n",
    )
    assert call_tool("pack_data", "--data", tmp_path, "--length", 100).returncode == 2

    packed = (store.folder / "packs.arrow").read_bytes()
    for lengths, data in (((128,), records[:-1]), ((128, 256), records)):
        other = SampleStore(make_store(tmp_path, tokenizer_dir, data, lengths), 128)
        with pytest.raises(UserError, match="has no packs"):
            read_packs(other)
    (other.folder / "packs.arrow").write_bytes(packed)
    assert len(read_packs(other)) == len(index)  # the same rows again: the index fits
    (other.path / "256" / "packs.arrow").write_bytes(packed)
    with pytest.raises(UserError, match="made for other data"):
        read_packs(SampleStore(other.path, 256))
    old = index.table.drop_columns("sum_squares")
    with pa.ipc.new_file(str(other.folder / "packs.arrow"), old.schema) as out:
        out.write_table(old)
    with pytest.raises(UserError, match="of an earlier version, without sum_squares; run pack_data"):
        read_packs(other)


def test_nothing_to_pack(tmp_path, tokenizer_dir):
    path = make_store(tmp_path, tokenizer_dir, [""], (128,))
    with pytest.raises(UserError, match="holds no sample"):
        write_packs(path, 128, 0)


def test_the_planner_sees_the_documents_of_packs(tmp_path, tokenizer_dir):
    path = make_store(tmp_path, tokenizer_dir, [conversation("Hi", "Yes " * k) for k in range(1, 9)], (128,))
    write_packs(path, 128, seed=3)
    store = SampleStore(path, 128)
    packs = PackShape.of_data(DataConfig(str(path), 128))
    assert len(packs.document_bounds) == len(read_packs(store))
    assert all(bounds[0] == 0 and bounds[-1] == 128 for bounds in packs.document_bounds)
    documents = [n for bounds in packs.document_bounds for n in np.diff(bounds).tolist()]
    assert not set(store[i].n_tokens for i in range(8)) - set(documents)
    assert packs.longest_document == max(store[i].n_tokens for i in range(8))

"""Packs hold every row once, never too much, and are nearly full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eagle.data.packing import pack_rows, read_packs, write_packs
from megatron_eagle.data.store import SampleStore
from megatron_eagle.errors import UserError
from tests.data.helpers import conversation, make_store, run_tool


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(0, 5))
def test_every_row_is_in_one_pack(lengths, seed):
    lengths = np.array(lengths, np.int64)
    packs = pack_rows(lengths, 600, seed)
    assert sorted(row for pack in packs for row in pack.tolist()) == list(range(len(lengths)))
    totals = [lengths[pack].sum() for pack in packs]
    assert all(0 < total <= 600 for total in totals)
    # Any two packs would overflow together: best fit never opens a pack that it could have done without.
    assert all(a + b > 600 for i, a in enumerate(totals) for b in totals[:i])


def mix(n):
    """Text, pictures of 1 to 13 tiles, clips of 8 to 24 frames."""
    generator = np.random.default_rng(0)
    text = generator.integers(50, 2000, n)
    picture = 100 + 258 * generator.integers(1, 14, n)
    clip = 200 + 263 * generator.integers(8, 25, n)
    return np.choose(generator.choice(3, n, p=[0.25, 0.5, 0.25]), [text, picture, clip])


@pytest.mark.parametrize(("n", "fill"), [(2000, 0.99), (20_000, 0.999)])
def test_packs_are_full(n, fill):
    lengths = mix(n)
    packs = pack_rows(lengths, 32768, 0)
    assert lengths.sum() / (len(packs) * 32768) > fill


def test_seed_decides_the_composition():
    lengths = mix(500)
    first, again, other = (pack_rows(lengths, 32768, seed) for seed in (1, 1, 2))
    assert [p.tolist() for p in first] == [p.tolist() for p in again]
    assert [p.tolist() for p in first] != [p.tolist() for p in other]


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

    done = run_tool("pack_data", "--data", path, "--length", 256)
    assert done.returncode == 0
    assert "8 samples in" in done.stdout
    assert "% full" in done.stdout
    wrong = run_tool("pack_data", "--data", path, "--length", 100)
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"error: {path} has no plan for length 100; it has 128, 256\n",
    )
    assert run_tool("pack_data", "--data", tmp_path, "--length", 100).returncode == 2

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


def test_nothing_to_pack(tmp_path, tokenizer_dir):
    path = make_store(tmp_path, tokenizer_dir, [""], (128,))
    with pytest.raises(UserError, match="holds no sample"):
        write_packs(path, 128, 0)

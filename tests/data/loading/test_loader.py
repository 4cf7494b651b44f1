"""One global order whatever the layout, one integer of state, weights that add up to one."""

import threading
from dataclasses import astuple

import numpy as np
import psutil
import pytest
import torch

from megatron_eagle.data.loading.batch import join
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.loss_weights import LOSS_WEIGHTINGS
from megatron_eagle.data.loading.packs import no_tiles
from megatron_eagle.data.media.decoder import ExactDecoder
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.tiles import image_tiles
from tests.data.helpers import conversation, every_tile, make_image, make_store, make_video

LENGTH = 200


@pytest.fixture(scope="module")
def path(tmp_path_factory, tokenizer_dir):
    """24 samples: text of one or two answers, two pictures, a clip."""
    folder = tmp_path_factory.mktemp("loader")
    make_image(folder / "a.png", (112, 56))
    make_image(folder / "b.png", (20, 20), seed=1)
    make_video(folder / "v.mp4", 40)
    records = []
    for k in range(8):
        two_turns = conversation("Hi", "Yes " * (k + 1))
        two_turns["conversations"] += conversation("And?", "No.")["conversations"]
        records += [
            two_turns,
            conversation("<image-2> or <image-1>?", "Both " * k + "all.", image=["a.png", "b.png"]),
            conversation("<video>", "A clip.", video="v.mp4"),
        ]
    store = make_store(folder, tokenizer_dir, records, (LENGTH,), sampling={"min_frames": 2, "fps": 1})
    write_packs(store, LENGTH, seed=0)
    return store


def loader(path, *, gbs=4, rank=0, size=1, decode=False, prefetch=False, **config):
    """Without prefetch there is nothing to close."""
    return PackLoader(
        DataConfig(str(path), LENGTH, prefetch=prefetch, **config),
        global_batch_size=gbs,
        data_parallel_rank=rank,
        data_parallel_size=size,
        plan=every_tile if decode else no_tiles,
    )


def values(pack):
    """What a pack is, without its plan, for `assert_close`."""
    return {**vars(pack), "plan": None, "samples": [astuple(sample) for sample in pack.samples]}


def shared_rows(path, consumed, size, gbs, k=1):
    """The packs of a global batch as lists of rows, in global order, put together from all ranks, of which
    each has `k` packs in a microbatch."""
    ranks = [
        loader(path, gbs=gbs, rank=r, size=size, packs_per_sequence=k).step(consumed).microbatches
        for r in range(size)
    ]
    assert {len(batches) for batches in ranks} == {gbs // size // k}
    reader = loader(path, gbs=gbs)
    packs = [reader._index.rows(int(pack)) for pack in reader.packs(consumed)]
    parts = [[rows_of_packs(batch) for batch in batches] for batches in ranks]
    assert sorted(rows for batches in parts for part in batches for rows in part) == sorted(packs)
    for batches in parts:  # each rank keeps the global order, and so does each microbatch
        for order in ([part[0] for part in batches], *batches):
            remaining = iter(packs)
            assert all(rows in remaining for rows in order)
    return packs


def rows_of_packs(batch):
    """Rows of each pack of the index that a microbatch holds."""
    parts = [[] for _ in range(len(batch.input_ids) // LENGTH)]
    for sample in batch.samples:
        parts[sample.start // LENGTH].append(sample.row)
    return parts


def test_the_global_order_does_not_depend_on_the_layout(path):
    n = loader(path).packs_per_epoch
    alone = loader(path, gbs=1)
    consumed = 0
    sequence = []
    while consumed < 2 * n:  # dp 4 -> 2 -> 8, mid-epoch
        sequence += shared_rows(path, consumed, (4, 2, 8)[consumed // 8 % 3], gbs=8)
        consumed += 8
    assert n % 8
    assert sequence == [alone.step(p).microbatches[0].sample_rows for p in range(consumed)]
    for epoch in (sequence[:n], sequence[n : 2 * n]):
        assert sorted(row for rows in epoch for row in rows) == list(range(24))
    assert sequence[:n] != sequence[n : 2 * n]


def test_packs_of_a_sequence_leave_batches_and_weights(path):
    """Which packs a global batch has, and what each of them is, does not depend on how many lie end to end; a
    run may go on with others."""
    alone = loader(path, gbs=8)
    for consumed, size, k in ((0, 2, 2), (8, 1, 4), (16, 1, 8), (24, 4, 2)):
        shared_rows(path, consumed, size, 8, k)
        expected = {pack.samples[0].number: pack for pack in alone.step(consumed).microbatches}
        for rank in range(size):
            batch = loader(path, gbs=8, rank=rank, size=size, packs_per_sequence=k).step(consumed)
            for sequence in batch.microbatches:
                numbers = [[s.number for s in sequence.samples if s.start // LENGTH == i] for i in range(k)]
                whole = join([expected[own[0]] for own in numbers])
                assert [s.number for s in whole.samples] == [number for own in numbers for number in own]
                torch.testing.assert_close(
                    values(sequence), {**values(whole), "plan": None, "pixel_values": None}, rtol=0, atol=0
                )
    with pytest.raises(UserError, match="a multiple of the data-parallel size 2 x 3 packs a sequence"):
        loader(path, gbs=8, size=2, packs_per_sequence=3)


def test_state_is_the_number_of_consumed_packs(path):
    straight = loader(path)
    first, second, third = (straight.step(c).microbatches for c in (0, 4, 8))
    resumed = loader(path).step(8).microbatches
    for a, b in zip(third, resumed, strict=True):
        torch.testing.assert_close(values(a), values(b))
    assert first[0].sample_rows != second[0].sample_rows
    assert loader(path, seed=1).step(0).microbatches[0].sample_rows != first[0].sample_rows


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
@pytest.mark.parametrize("multi_turn", [False, True])
def test_weights_equal_brute_force(path, weighting, multi_turn):
    store = SampleStore(path)
    batches = loader(path, gbs=3, loss_weighting=weighting, multi_turn=multi_turn).step(3).microbatches
    power = {"square": -0.5, "token": 0, "sample": -1}[weighting]
    expected = []
    for batch in batches:
        weights = np.zeros(LENGTH)
        for row, start in zip(batch.sample_rows, batch.document_bounds, strict=False):
            sample = store[row]
            for i in range(1, sample.n_tokens):
                if answer := sample.answers[i]:
                    n = (sample.answers == answer).sum() if multi_turn else (sample.answers > 0).sum()
                    weights[start + i - 1] = float(n) ** power
        expected.append(weights)
    expected = np.array(expected) / np.sum(expected)
    actual = torch.stack([batch.loss_weights for batch in batches]).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual.sum() == pytest.approx(1)


def test_layout_of_a_batch(path):
    store = SampleStore(path)
    for batch in loader(path, gbs=loader(path).packs_per_epoch).step(0).microbatches:
        bounds = batch.document_bounds
        assert (bounds[0], bounds[-1]) == (0, LENGTH)
        assert bounds == sorted(set(bounds))
        assert len(bounds) - 1 in (len(batch.sample_rows), len(batch.sample_rows) + 1)
        assert batch.labels.tolist() == [*batch.input_ids.tolist()[1:], 0]
        for row, start, end in zip(batch.sample_rows, bounds, bounds[1:], strict=False):
            assert batch.input_ids[start:end].tolist() == store[row].ids.tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            assert batch.loss_weights[end - 1] == 0
        padding = bounds[len(batch.sample_rows)]
        assert not batch.loss_weights[padding:].any()
        image_tokens = (batch.input_ids == store.manifest.image_token_id).sum()
        assert image_tokens == batch.n_tiles * store.manifest.tokens_per_tile
        assert batch.pixel_values is None
        assert (batch.input_ids.dtype, batch.loss_weights.dtype) == (torch.int64, torch.float32)


def test_pixels_follow_the_image_tokens(path):
    whole = loader(path, gbs=loader(path).packs_per_epoch, decode=True)
    for batch in whole.step(0).microbatches:
        assert batch.pixel_values.shape == (batch.n_tiles, 3, 28, 28)
        assert batch.pixel_values.dtype == torch.uint8
        offset = 0
        for row in batch.sample_rows:
            kind = row % 3
            n = SampleStore(path)[row].n_tiles
            tiles = batch.pixel_values[offset : offset + n]
            if kind == 1:  # the second picture is shown first: 1 tile, then 8 + thumbnail of the first
                assert n == 10
                torch.testing.assert_close(tiles[9], first_thumbnail(path))
            elif kind == 2:
                assert n == 4
                assert not torch.equal(tiles[0], tiles[3])
            else:
                assert n == 0
            offset += n
        assert offset == batch.n_tiles
    whole.close()


def first_thumbnail(path):
    return image_tiles(np.array(load_image(str(path.parent / "a.png"))), (1, 1), 28)[0]


def test_a_pack_without_pictures_has_no_tiles(tmp_path, tokenizer_dir):
    path = make_store(tmp_path, tokenizer_dir, [conversation("Hi", "Ho")], (LENGTH,))
    write_packs(path, LENGTH, 0)
    batch = loader(path, gbs=1, decode=True).step(0).microbatches[0]
    assert batch.pixel_values.shape == (0, 3, 28, 28)


def test_mistakes_are_one_line(path, tmp_path):
    with pytest.raises(UserError, match="must be a multiple of the data-parallel size 3"):
        loader(path, size=3)
    with pytest.raises(UserError, match="loss_weighting must be one of square, token, sample"):
        loader(path, loss_weighting="cube")
    with pytest.raises(UserError, match="no token store"):
        loader(tmp_path)


def test_media_that_changed_have_failed(tmp_path, tokenizer_dir):
    make_image(tmp_path / "a.png", (56, 56))
    path = make_store(tmp_path, tokenizer_dir, [conversation("<image>", "x", image="a.png")], (LENGTH,))
    write_packs(path, LENGTH, 0)
    make_image(tmp_path / "a.png", (30, 30))
    changed = loader(path, gbs=1, decode=True).step(0)
    assert changed.failures[0].reason.startswith("media changed since preprocessing: ")
    assert changed.failures[0].source.endswith("data.jsonl:1") and changed.failures[0].row == 0
    assert not changed.microbatches[0].pixel_values.any()
    (tmp_path / "a.png").unlink()
    assert "missing media" in loader(path, gbs=1, decode=True).step(0).failures[0].reason


@pytest.mark.parametrize("k", [1, 2])
def test_prefetch_follows_a_jump(path, k):
    ahead = loader(path, decode=True, prefetch=True, packs_per_sequence=k)
    for position in (0, 4, 16, 20, 8):
        found = ahead.step(position)
        expected = loader(path, decode=True, packs_per_sequence=k).step(position)
        packs, others = ([values(pack) for pack in batch.microbatches] for batch in (found, expected))
        torch.testing.assert_close(packs, others, rtol=0, atol=0)
        held = [value.nbytes for pack in packs for value in pack.values() if isinstance(value, torch.Tensor)]
        assert ahead._prepare(position).nbytes == sum(held)
    ahead.close()


def test_packs_end_to_end_keep_their_documents(path):
    """Joined tensors are those of the packs, and samples stand where their tokens are, numbers and all."""
    store, packs = SampleStore(path), loader(path).step(0).microbatches
    assert join(packs[:1]) is packs[0]
    joined = join([packs[2], packs[0]])  # no neighbours: both padding and numbers lie between
    assert joined.document_bounds == sorted(set(joined.document_bounds)) and LENGTH in joined.document_bounds
    assert joined.document_bounds[-1] == 2 * LENGTH == len(joined.input_ids)
    for name in ("input_ids", "labels", "loss_weights", "group_ids", "position_ids"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(packs[i], name) for i in (2, 0)]))
    assert [s.number for s in joined.samples] == [s.number for i in (2, 0) for s in packs[i].samples]
    for sample in joined.samples:
        assert {sample.start, sample.end} <= set(joined.document_bounds)
        assert joined.input_ids[sample.start : sample.end].tolist() == store[sample.row].ids.tolist()
    assert joined.n_tiles == packs[2].n_tiles + packs[0].n_tiles > 0
    assert joined.tiles_wanted == packs[2].tiles_wanted + packs[0].tiles_wanted > 0


def test_an_error_of_the_plan_names_the_rows(path):
    def refuse(batch):
        raise UserError("too long")

    config = DataConfig(str(path), LENGTH)
    broken = PackLoader(config, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1, plan=refuse)
    for _ in range(2):  # the second time as well
        with pytest.raises(UserError, match=r"the pack of store rows \[.*\]: too long"):
            broken.step(0)
    broken.close()


@pytest.mark.parametrize("threads", [1, 50])
def test_a_decode_that_hangs_fails_alone(path, monkeypatch, threads):
    """The media after it are read; when all threads have been held up, what has not begun is given up."""
    released, whole = threading.Event(), loader(path, gbs=8, decode=True).step(0)
    picture = ExactDecoder.picture

    def hang(self, file, *args, **kwargs):
        if file.endswith("a.png"):
            released.wait(60)
        return picture(self, file, *args, **kwargs)

    monkeypatch.setattr(ExactDecoder, "picture", hang)
    slow = loader(path, gbs=8, decode=True, prefetch=True, decode_threads=threads, decode_timeout_s=0.2)
    batch = slow.step(0)
    reasons = [medium.reason for medium in batch.failures.values()]
    assert "decoding takes too long" in reasons[0]
    if threads == 1:
        given_up = [reason for reason in reasons if reason.startswith("not read: ")]
        assert len(reasons) - len(given_up) <= 2, "the first, and one that had begun by then"
    else:
        shown = {row for pack in batch.microbatches for row in pack.sample_rows if row % 3 == 1}
        assert {medium.row for medium in batch.failures.values()} == shown and len(shown) > 1
        assert all("decoding takes too long" in reason for reason in reasons)
    read = 0
    for pack, expected in zip(batch.microbatches, whole.microbatches, strict=True):
        came = pack.pixel_values.flatten(1).any(1)
        assert torch.equal(pack.pixel_values[came], expected.pixel_values[came])
        read += int(came.sum())
    assert 0 < read < sum(pack.n_tiles for pack in whole.microbatches)
    released.set()
    slow.close()


def test_memory_is_flat(path):
    """Over some hundred steps, media and all; what waits is bounded."""
    process, steps = psutil.Process(), loader(path, gbs=1, decode=True, prefetch=True, prefetch_bytes=10**6)
    resident = []
    for position in range(300):
        steps.step(position)
        resident.append(process.memory_info().rss)
    steps.close()
    assert max(resident[200:]) < max(resident[50:150]) + 10 * 2**20


@pytest.mark.parametrize("k", [1, 2])
def test_weights_without_some_samples(path, k):
    """As from the definition, for every weighting; a batch of which nothing is left weighs nothing."""
    store, rng = SampleStore(path), np.random.default_rng(0)
    for weighting in LOSS_WEIGHTINGS:
        reader = loader(path, gbs=4, loss_weighting=weighting, packs_per_sequence=k)
        batch = reader.step(4)
        left_out = set(rng.choice(reader.n_samples(4), 3, replace=False).tolist())
        batch = reader.leave_out(batch, left_out)
        power = {"square": -0.5, "token": 0, "sample": -1}[weighting]
        expected = torch.zeros(4 // k, k * LENGTH, dtype=torch.float64)
        for weights, pack in zip(expected, batch.microbatches, strict=True):
            for sample in pack.samples:
                supervised = torch.from_numpy(store[sample.row].answers[1:] > 0)
                if sample.number not in left_out:
                    weights[sample.start : sample.end - 1] = supervised * float(supervised.sum()) ** power
        expected /= expected.sum()
        found = torch.stack([pack.loss_weights for pack in batch.microbatches])
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)
        assert int((expected > 0).sum()) > 0

"""A store that is followed while it grows gives what the complete one gives, whenever it is read."""

import json
import os
import shutil
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.loading import follow as follow_module
from megatron_eagle.data.loading.follow import FollowConfig, FollowedPacks
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import no_tiles
from megatron_eagle.data.packing.windows import n_windows
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.store import shards as shards_module
from megatron_eagle.data.store import signs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.store.shards import ShardStore, open_any_rows, read_head, shard_path, store_folder
from megatron_eagle.data.store.signs import SignOfLife, Watch, growing_folder
from megatron_eagle.data.store.writer import StoreWriter
from megatron_eagle.errors import UserError
from tests.data.helpers import contents, conversation, every_tile, make_image, write_jsonl
from tests.data.killed import settings as preprocess_settings

LENGTH, ROWS, SEED, N_SHARDS = 100, 6, 3, 12


def write_recipe(folder: Path, broken: range = range(0)) -> Path:
    """Text, pictures that are taken 2.5 times, and a rare set; lines `broken` of the pictures are."""
    make_image(folder / "a.png", (112, 56))
    records = {
        "text": [conversation("Hi", "Yes " * (k % 9 + 1)) for k in range(31)],
        "pictures": [
            "{broken" if k in broken else conversation("<image>?", f"Picture {k}", image="a.png")
            for k in range(14)
        ],
        "rare": [conversation("Once", "Never")],
    }
    recipe = {}
    for name, own in records.items():
        write_jsonl(folder / f"{name}.jsonl", own)
        recipe[name] = {"annotation": f"{name}.jsonl", "repeat_time": {"pictures": 2.5}.get(name, 1)}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder / "recipe.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer_dir):
    """67 takes in 12 shards of 6; some are dropped."""
    folder = tmp_path_factory.mktemp("follow")
    recipe = write_recipe(folder, broken=range(3, 6))
    chosen = preprocess_settings(str(tokenizer_dir))
    preprocess(recipe, folder / "store", chosen, Execution(1), follow=ROWS)
    return folder / "store"


class Growing:
    """The store `whole` while it is made, as far as `let` says."""

    def __init__(self, whole: Path, folder: Path):
        self._whole, self.path = whole, folder / "store"
        self.part = growing_folder(self.path)
        self.part.mkdir(parents=True)
        for name in ("manifest.json", "tokenizer"):
            copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
            copy(whole / name, self.part / name)
        (self.part / str(LENGTH) / "shards").mkdir(parents=True)
        self._n = 0

    def let(self, n_shards: int) -> None:
        """So many shards are there, and tokens of half of the next one."""
        here, there = self._whole / str(LENGTH), self.part / str(LENGTH)
        for number in range(self._n, n_shards):
            head = read_head(here, number)
            for name, size in (("tokens", 4), ("answers", 2)):
                end = (head.first_token + head.n_tokens) * size + 10
                # At its end, as preprocessing does: a reader has mapped what was there.
                with (there / f"{name}.bin").open("ab") as file:
                    file.write((here / f"{name}.bin").read_bytes()[file.tell() : end])
            shutil.copy(shard_path(here, number), shard_path(there, number))
        self._n = max(self._n, n_shards)

    def finish(self) -> None:
        """The complete store is at its place."""
        if self.part.exists():
            shutil.rmtree(self.part)
            shutil.copytree(self._whole, self.path)

    def begin_anew(self) -> None:
        """Nothing is there."""
        shutil.rmtree(self.part / str(LENGTH))
        (self.part / str(LENGTH) / "shards").mkdir(parents=True)
        self._n = 0


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch):
    monkeypatch.setattr(follow_module, "LOOK_SECONDS", 0.0)


def loader(path, k, *, gbs=8, rank=0, size=1, prefetch=False, plan=every_tile, packs=1):
    follow = FollowConfig(k)
    return PackLoader(
        DataConfig(str(path), LENGTH, seed=SEED, prefetch=prefetch, follow=follow, packs_per_sequence=packs),
        global_batch_size=gbs,
        data_parallel_rank=rank,
        data_parallel_size=size,
        plan=plan,
    )


def same(one, other):
    """Whether two global batches of a rank are, bit for bit."""
    assert one.first_pack == other.first_pack and one.total == other.total
    assert len(one.microbatches) == len(other.microbatches)
    for a, b in zip(one.microbatches, other.microbatches, strict=True):
        for name, value in vars(a).items():
            again = getattr(b, name)
            assert torch.equal(value, again) if isinstance(value, torch.Tensor) else value == again, name


def test_rows_are_those_of_the_complete_store(store):
    """By number: what a preview, a replay or a ledger names is the same in both."""
    for length in (100, 300):
        complete, shards = SampleStore(store, length), ShardStore(store, length)
        assert len(complete) == len(shards) > 50
        for row in range(len(complete)):
            for name, value in vars(complete[row]).items():
                again = getattr(shards[row], name)
                assert np.array_equal(value, again) if isinstance(value, np.ndarray) else value == again
        for name in ("n_tokens", "answer_lengths"):
            assert complete.column(name).to_pylist() == shards.column(name).to_pylist()
    with pytest.raises(IndexError):
        shards[len(shards)]


STEPS, BATCH = 8, 8  # two epochs of 32 or more packs


@settings(max_examples=3, deadline=None)
@given(
    k=st.integers(1, 14),
    sizes=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4),
    resumes=st.sets(st.integers(0, STEPS)),
    speed=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    packs=st.sampled_from([1, 2]),
)
def test_followed_is_finished(store, tmp_path_factory, k, sizes, resumes, speed, packs):
    """Over window sizes, data-parallel sizes, packs of a sequence, points of resume and speeds of
    preprocessing."""
    growing = Growing(store, tmp_path_factory.mktemp("growing"))
    finished = {}
    there, turns, read, size = 0, 0, None, 0
    for step in range(STEPS):
        first = BATCH * step
        if step in resumes or not size:
            size = sizes[step % len(sizes)]
            ranks = [
                loader(growing.path, k, rank=rank, size=size, plan=no_tiles, packs=packs)
                for rank in range(size)
            ]
            for rank in ranks if read else ():
                rank.go_on(*read)
        while not all([rank.followed.reach(first + BATCH) for rank in ranks]):
            if not turns:
                with pytest.raises(UserError, match="need window"):  # and nobody reads half of it
                    loader(growing.path, k).need(first)
            there += speed[turns % len(speed)] + (turns > 20)
            turns += 1
            growing.let(min(there, N_SHARDS))
            if there > N_SHARDS:
                growing.finish()
        for rank, reader in enumerate(ranks):
            if (rank, size) not in finished:
                finished[rank, size] = loader(store, k, rank=rank, size=size, plan=no_tiles, packs=packs)
            same(reader.step(first), finished[rank, size].step(first))
        read = ranks[0].identity(first), first, BATCH
        assert read[0].difference(finished[0, size].identity(first)) is None


def test_moved_to_its_place_at_any_moment(store, tmp_path, monkeypatch):
    """Between any two looks at the files: all packs are those of the complete store."""
    looks, moves = count(), {}  # at which look what is moved

    def counted(function):
        def look(*arguments, **settings):
            moves.pop(next(looks), lambda: None)()
            return function(*arguments, **settings)

        return look

    def packs_of(path):
        """Of the first epoch."""
        packs = FollowedPacks(ShardStore(path, LENGTH), FollowConfig(4), SEED)
        for _ in range(2):  # a store that is moved while it is looked at may be found at the next look
            while len(packs._starts) <= packs._n_windows and packs.reach(len(packs) + 1):
                pass
        return [packs.rows(number) for number in range(len(packs))]

    expected = packs_of(store)
    for name in ("read_head", "read_manifest", "_open"):
        monkeypatch.setattr(shards_module, name, counted(getattr(shards_module, name)))
    monkeypatch.setattr(Path, "is_file", counted(Path.is_file))
    for moment in count():
        growing = Growing(store, tmp_path / str(moment))
        growing.let(N_SHARDS)
        looks = count()
        moves[moment] = growing.finish
        assert packs_of(growing.path) == expected, moment
        if moves.pop(moment, None):
            break
    assert moment > 30


def test_an_epoch_has_every_row_once_and_another_order_each(store):
    packs = FollowedPacks(ShardStore(store, LENGTH), FollowConfig(3), SEED)
    n = n_windows(ShardStore(store, LENGTH), 3)
    packs.reach(200)
    first, second = (
        [packs.rows(p) for p in range(packs._starts[e * n], packs._starts[(e + 1) * n])] for e in (0, 1)
    )
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(len(SampleStore(store, LENGTH))))
    assert first != second and sorted(first) == sorted(second)
    other = FollowedPacks(ShardStore(store, LENGTH), FollowConfig(3), SEED + 1)
    other.reach(200)
    assert [other.rows(p) for p in range(len(first))] != first


def test_a_window_that_is_dropped_whole(tmp_path, tokenizer_dir):
    records = ["{broken" if 4 <= k < 8 else conversation("Hi", "Yes") for k in range(12)]
    write_jsonl(tmp_path / "data.jsonl", records)
    (tmp_path / "recipe.json").write_text('{"d": {"annotation": "data.jsonl"}}')
    chosen = preprocess_settings(str(tokenizer_dir))
    preprocess(tmp_path / "recipe.json", tmp_path / "store", chosen, Execution(1), follow=4)
    packs = FollowedPacks(ShardStore(tmp_path / "store", LENGTH), FollowConfig(1), 0)
    assert packs.reach(20)
    assert packs._starts[1] == packs._starts[2] and packs.rows(packs._starts[2])
    assert {row for p in range(packs._starts[3]) for row in packs.rows(p)} == set(range(8))

    write_jsonl(tmp_path / "data.jsonl", ["{broken"] * 5)
    preprocess(tmp_path / "recipe.json", tmp_path / "none", chosen, Execution(1), follow=4)
    with pytest.raises(UserError, match="holds no sample at length 100"):
        FollowedPacks(ShardStore(tmp_path / "none", LENGTH), FollowConfig(1), 0).reach(1)


def test_prefetch_waits_for_a_window(store, tmp_path):
    growing, complete = Growing(store, tmp_path), loader(store, 2)
    growing.let(4)
    reader = loader(growing.path, 2, prefetch=True)
    same(reader.step(0), complete.step(0))
    assert not reader.followed.reach(24)
    threading.Timer(0.3, lambda: growing.let(N_SHARDS)).start()
    for step in range(1, 6):
        same(reader.step(8 * step), complete.step(8 * step))
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_who_waits_can_be_closed(store, tmp_path):
    growing = Growing(store, tmp_path)
    growing.let(4)
    reader = loader(growing.path, 2, prefetch=True)
    reader.step(0)
    reader.close()  # while it waits for the window of the batches that follow
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_store_that_is_begun_anew(store, tmp_path, tokenizer_dir):
    """With the same bytes a reader goes on, with others it ends with a line."""
    growing = Growing(store, tmp_path)
    growing.let(6)
    reader = loader(growing.path, 2)
    reader.need(0)
    read = reader.identity(0), 0, 8
    growing.begin_anew()
    growing.let(N_SHARDS)
    reader.need(32)
    (tmp_path / "other").mkdir()
    write_recipe(tmp_path / "other")  # media that were broken are in order now
    chosen = preprocess_settings(str(tokenizer_dir))
    other = tmp_path / "other" / "store"
    preprocess(tmp_path / "other" / "recipe.json", other, chosen, Execution(1), follow=ROWS)
    reader = loader(growing.path, 2)
    reader.need(0)
    shutil.rmtree(growing.part / str(LENGTH))
    shutil.copytree(other / str(LENGTH), growing.part / str(LENGTH))
    with pytest.raises(UserError, match="begun anew or changed while it was read: window"):
        reader.need(40)
    resumed = loader(growing.path, 2)
    resumed.go_on(*read)
    with pytest.raises(UserError, match="packs 0 to 7 are not those that this run has read"):
        resumed.need(0)
    with pytest.raises(UserError, match="shards_per_window 2 there, 3 here"):
        loader(store, 3).go_on(*read)


def test_other_input_in_the_place_of_the_first_window(store, tmp_path, tokenizer_dir):
    """How long an epoch is was known before anything was read; it would be that of the other store."""
    growing = Growing(store, tmp_path)
    reader = loader(growing.path, 2)
    (tmp_path / "other").mkdir()
    recipe = write_recipe(tmp_path / "other")
    other = tmp_path / "other" / "store"
    preprocess(recipe, other, preprocess_settings(str(tokenizer_dir)), Execution(1), follow=ROWS)
    shutil.rmtree(growing.part)
    shutil.copytree(other, growing.part)
    with pytest.raises(UserError, match="begun anew or changed while it was read: .* other input"):
        reader.need(0)
    loader(growing.path, 2).need(0)  # the control: who begins now reads the other one


def die_at(call: int) -> int:
    """Preprocess in a process that ends without a word before its `call`-th write; how many there were."""
    seen = count(1)

    def dying(function):
        def wrapped(*arguments, **more):
            if next(seen) == call:
                os._exit(9)
            return function(*arguments, **more)

        return wrapped

    for owner, name in ((Path, "replace"), (Path, "rename"), (os, "fsync"), (StoreWriter, "add")):
        setattr(owner, name, dying(getattr(owner, name)))
    return seen


@pytest.mark.parametrize(
    "calls", [(47, 118, 150), pytest.param(range(1, 230, 9), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_killed_at_any_write(tmp_path, tokenizer_dir, calls):
    """What readers saw stays, and is what the complete store has; and the store is the same in the end."""
    recipe, chosen = write_recipe(tmp_path, broken=range(3, 6)), preprocess_settings(str(tokenizer_dir))
    expected, execution = tmp_path / "expected", Execution(1, shard=8)
    preprocess(recipe, expected, chosen, execution, follow=ROWS)
    seen_shards = set()
    for call in calls:
        output = tmp_path / str(call)
        child = os.fork()
        if not child:
            die_at(call)
            preprocess(recipe, output, chosen, execution, follow=ROWS)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        if store_folder(output) != output:
            for length in chosen.lengths:
                found, complete = ShardStore(output, length), SampleStore(expected, length)
                seen_shards.add(found.shards_there)
                for row in range(len(found)):
                    assert np.array_equal(found[row].ids, complete[row].ids)
                    assert (found[row].source, found[row].line) == (complete[row].source, complete[row].line)
        part = growing_folder(output)
        before = {path.relative_to(part): path.stat().st_ino for path in part.rglob("shards/0*.arrow")}
        preprocess(recipe, output, chosen, execution, follow=ROWS)
        assert contents(output) == contents(expected)
        now = {path.relative_to(output): path.stat().st_ino for path in output.rglob("shards/*.arrow")}
        assert before.items() <= now.items()  # what was there is not written again
    assert len(seen_shards) > 2


def test_other_input_at_the_same_place_is_told(store, tmp_path):
    growing = Growing(store, tmp_path)
    growing.let(4)
    reader = loader(growing.path, 2)
    reader.need(0)
    growing.finish()
    manifest = growing.path / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"input_key": "another"}))
    with pytest.raises(UserError, match="made from other input or settings"):
        reader.need(40)


def test_what_cannot_be_followed(store, tmp_path, tokenizer_dir):
    write_recipe(tmp_path)
    chosen = preprocess_settings(str(tokenizer_dir))
    preprocess(tmp_path / "recipe.json", tmp_path / "plain", chosen, Execution(1))
    with pytest.raises(UserError, match="was made without preprocess run --follow"):
        loader(tmp_path / "plain", 2)
    with pytest.raises(UserError, match="no token store"):
        loader(tmp_path / "nothing", 2)
    growing = Growing(store, tmp_path)
    with pytest.raises(UserError, match="is not complete yet: .* or train with data.follow"):
        SampleStore(growing.path)
    assert len(open_any_rows(growing.path, LENGTH)) == 0
    growing.let(2)
    assert 0 < len(open_any_rows(growing.path, LENGTH)) < 12
    with pytest.raises(UserError, match="--follow must be from 1"):
        preprocess(tmp_path / "recipe.json", tmp_path / "x", chosen, Execution(1), follow=-1)


def test_a_sign_of_life_is_told_from_silence(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signs.time, "monotonic", lambda: now[0])
    (tmp_path / ".store.journal").mkdir()
    watch = Watch(tmp_path / "store")
    now[0] += 50
    assert watch.look() == 50 and "no preprocessing" in watch.words
    with SignOfLife(tmp_path / "store", seconds=1000) as sign:
        assert watch.look() == 0
        now[0] += 30
        assert watch.look() == 30  # killed or stopped
        sign._write("")
        assert watch.look() == 0 and "process" in watch.words
    with pytest.raises(RuntimeError), SignOfLife(tmp_path / "store", seconds=1000):
        assert watch.look() == 0
        raise RuntimeError("the disk is full")
    now[0] += 5
    assert watch.look() == 5 and watch.words.endswith("ended: the disk is full")

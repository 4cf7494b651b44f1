"""Stores made of tables: the same samples as from files, the same bytes however made, and no rubbish."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import av
import numpy as np
import pyarrow as pa
import pytest

from megatron_eagle.data.annotations.mixture import read_recipe
from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.data.media.source import open_bytes
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.store.reader import SampleStore
from tests.data import published_sets
from tests.data.helpers import call_tool, contents, make_pdf, make_video, read_media
from tests.data.killed import EXECUTION, settings
from tests.data.published_sets import IMAGE, held, picture, write_parquet
from tests.paths import REPO

FORMS = {
    "FineVision": (published_sets.fine_vision, {}),
    "The Cauldron": (published_sets.cauldron, {}),
    "LLaVA-OneVision": (published_sets.one_vision, {}),
    "Cambrian": (published_sets.cambrian, {}),
    "saved": (published_sets.saved, {}),
    "saved splits": (published_sets.saved_splits, {"split": "test"}),
}


def write_recipe(folder, **entries):
    (folder / "recipe.json").write_text(json.dumps(entries))
    return folder / "recipe.json"


def make(recipe, output, tokenizer_dir, execution=EXECUTION):
    preprocess(recipe, output, settings(str(tokenizer_dir)), execution)
    return SampleStore(output)


def as_files(recipe, folder):
    """A recipe of JSON lines and files with the same content as that of tables: an oracle without a store's
    own media."""
    entries = {}
    for dataset in read_recipe(recipe):
        source = open_records(dataset.annotation)
        records = [json.loads(source.read(number)) for number in range(len(source))]
        name = f"{len(entries)}.jsonl"
        with (folder / name).open("w") as lines:
            for record in records:
                text = json.dumps(written(record, folder))
                lines.write(f"{text}\n")
        entries[name] = {"annotation": name, "root": dataset.root}
    return write_recipe(folder, **entries)


def written(value, folder):
    """A record whose media inside tables are files."""
    if isinstance(value, str) and value.startswith(("parquet://", "arrow://")):
        path = folder / f"{abs(hash(value))}.png"
        with open_bytes(value) as file:
            path.write_bytes(file.read())
        return str(path)
    if isinstance(value, dict):
        return {key: written(inner, folder) for key, inner in value.items()}
    return [written(inner, folder) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("form", FORMS)
def test_the_same_samples_as_from_files(tmp_path, tokenizer_dir, form):
    publish, entry = FORMS[form]
    publish(tmp_path / "set")
    store = make(write_recipe(tmp_path, a={"annotation": "set", **entry}), tmp_path / "store", tokenizer_dir)
    (tmp_path / "files").mkdir()
    other = make(as_files(tmp_path / "recipe.json", tmp_path / "files"), tmp_path / "other", tokenizer_dir)
    assert len(store) == len(other) > 3
    media = [[medium for row in range(len(s)) for medium in read_media(s, row)] for s in (store, other)]
    assert len(media[0]) == len(media[1]) > 1
    assert all((a == b).all() for a, b in zip(*media, strict=True))
    assert len({medium.mean().item() for medium in media[0]}) > 1
    for row in range(len(store)):
        for name in ("ids", "answers"):
            assert (getattr(store[row], name) == getattr(other[row], name)).all()


@pytest.fixture
def recipe(tmp_path):
    """Tables of several files, with broken rows, pictures that come again, repeated rows, and lines."""
    published_sets.fine_vision(tmp_path / "a", 16)
    turn = pa.struct({"user": pa.string(), "assistant": pa.string()})
    rows = []
    for k in range(12):
        image = {"bytes": b"no picture", "path": None} if k == 5 else held(k % 3)
        answer = "word " * 400 if k == 7 else f"Again {k}."
        rows.append({"images": [image], "texts": [{"user": "What?", "assistant": answer}]})
    write_parquet(tmp_path / "b.parquet", rows, {"images": pa.list_(IMAGE), "texts": pa.list_(turn)}, group=5)
    published_sets.saved(tmp_path / "c", 6)
    (tmp_path / "d.jsonl").write_text('{"question": "What?", "answer": "Text."}\n' * 3)
    return write_recipe(
        tmp_path,
        a={"annotation": "a", "repeat_time": 1.5},
        b={"annotation": "b.parquet"},
        c={"annotation": "c"},
        d={"annotation": "d.jsonl"},
    )


def members(store):
    names = []
    for path in sorted((store / "media").glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [archive.extractfile(member).read() for member in archive]
    return names


def named(store):
    """The media that the rows of all lengths name."""
    own = [SampleStore(store, length) for length in SampleStore(store).manifest.lengths]
    return {image.path for rows in own for i in range(len(rows)) for image in rows[i].images}


def test_what_is_stored(tmp_path, recipe, tokenizer_dir):
    """Each picture of a kept row once; nothing of the row that is too long and of the one that is broken."""
    store = make(recipe, tmp_path / "store", tokenizer_dir)
    assert [entry["kind"] for entry in read_ledger(tmp_path / "store")] == [
        "unreadable image",
        "too long",
        "too long",
    ]
    shown = [
        picture(k)
        for k in (1, 2, 102, 3, 103, 4, 104, 6, 7, 107, 8, 108, 9, 109, 11, 12, 112, 13, 113, 14, 114)
    ]
    assert members(tmp_path / "store") == [*shown, picture(0)]
    inside = {path for path in named(tmp_path / "store") if path.startswith("tar://")}
    assert len(inside) == len(shown) + 1
    assert sorted(map(content, inside)) == sorted([*shown, picture(0)])
    assert len(store) == 24 + 10 + 6 + 3
    assert {path.partition("://")[0] for path in named(tmp_path / "store")} == {"tar", "arrow"}


def content(path):
    with open_bytes(path) as file:
        return file.read()


def read_ledger(store):
    return [json.loads(line) for line in (store / "dropped.jsonl").read_text().splitlines()]


def test_the_same_bytes_however_made(tmp_path, recipe, tokenizer_dir):
    make(recipe, tmp_path / "one", tokenizer_dir)
    make(recipe, tmp_path / "two", tokenizer_dir, Execution(workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "media/00000.tar" in contents(tmp_path / "one")


KILLS = [("add", 21, "after"), ("rename", 3, "before"), ("ledger", 1, "before"), ("rename", 11, "after")]


def test_killed_anywhere(tmp_path, recipe, tokenizer_dir):
    make(recipe, tmp_path / "expected", tokenizer_dir)
    running = []
    for i, kill in enumerate(KILLS):
        (tmp_path / f"{i}").mkdir()
        arguments = [str(value) for value in (recipe, tmp_path / f"{i}" / "store", tokenizer_dir, *kill)]
        running.append(subprocess.Popen([sys.executable, "-m", "tests.data.killed", *arguments], cwd=REPO))
    for i, process in enumerate(running):
        assert process.wait() == -signal.SIGKILL
        make(recipe, tmp_path / f"{i}" / "store", tokenizer_dir)
        assert contents(tmp_path / f"{i}" / "store") == contents(tmp_path / "expected")
        assert [path.name for path in (tmp_path / f"{i}").iterdir()] == ["store"]


def test_a_store_may_be_moved(tmp_path, recipe, tokenizer_dir):
    """With its own media, which are all that is left of the parquet files."""
    store = make(recipe, tmp_path / "store", tokenizer_dir)
    before = [tiles for row in range(len(store)) for tiles in read_media(store, row)]
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "store", tmp_path / "elsewhere" / "moved")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b.parquet").unlink()
    moved = SampleStore(tmp_path / "elsewhere" / "moved")
    after = [tiles for row in range(len(moved)) for tiles in read_media(moved, row)]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    shown = call_tool("preview_data", "show", moved.path, "--sample", 1, "--html", tmp_path / "page.html")
    assert (
        shown.returncode == 0 and "problem" not in (tmp_path / "page.html").read_text().split("</style>")[1]
    )


def test_kept_until_something_changes(tmp_path, recipe, tokenizer_dir, capsys):
    make(recipe, tmp_path / "store", tokenizer_dir)
    make(recipe, tmp_path / "store", tokenizer_dir)
    assert "up to date" in capsys.readouterr().out
    tar = tmp_path / "store" / "media" / "00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-2000])
    make(recipe, tmp_path / "store", tokenizer_dir)
    assert "up to date" not in capsys.readouterr().out and tar.read_bytes() == whole
    os.utime(tmp_path / "b.parquet", ns=(1, 1))
    make(recipe, tmp_path / "store", tokenizer_dir)
    assert "up to date" not in capsys.readouterr().out


def test_failed_rows_are_tried_again(tmp_path, tokenizer_dir):
    """The media of the others are taken over from the old store: the bytes are those of a new one."""
    published_sets.cambrian(tmp_path / "a")
    published_sets.fine_vision(tmp_path / "b")
    recipe = write_recipe(tmp_path, b={"annotation": "b"}, a={"annotation": "a"})
    missing = tmp_path / "a" / "coco" / "2.png"
    missing.rename(tmp_path / "kept.png")
    assert len(make(recipe, tmp_path / "store", tokenizer_dir)) == 13
    (tmp_path / "kept.png").rename(missing)
    make(recipe, tmp_path / "store", tokenizer_dir, Execution(1, retry_failed=True))
    assert len(make(recipe, tmp_path / "new", tokenizer_dir)) == 14
    assert contents(tmp_path / "store") == contents(tmp_path / "new")


def test_videos_frames_and_sound(tmp_path, tokenizer_dir):
    """A video file and frames inside a table are videos; sound is refused by name."""
    clip = make_video(tmp_path / "v.mp4", 20).read_bytes()
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "A clip."}]
    rows = [{"video": {"bytes": clip, "path": "v.mp4"}, "conversations": turns}] * 2
    write_parquet(tmp_path / "v.parquet", rows, {"video": IMAGE, "conversations": pa.list_(turn)})
    frames = [{"video": [held(k) for k in range(6)], "fps": 2.0, "conversations": turns}]
    write_parquet(tmp_path / "f.parquet", frames, {"video": pa.list_(IMAGE), "conversations": pa.list_(turn)})
    sound = [{"audio": {"bytes": b"RIFF", "path": "a.wav"}, "conversations": turns}]
    write_parquet(tmp_path / "s.parquet", sound, {"audio": IMAGE, "conversations": pa.list_(turn)})
    entries = {name: {"annotation": f"{name}.parquet"} for name in "vfs"}
    store = make(write_recipe(tmp_path, **entries), tmp_path / "store", tokenizer_dir)
    (reason,) = {entry["reason"] for entry in read_ledger(tmp_path / "store") if entry["kind"] != "too long"}
    assert reason == 'unsupported key: "audio" of a record'
    assert [len(store[row].videos[0].frames) for row in range(3)] == [8, 8, 6]
    assert members(tmp_path / "store") == [clip, *map(picture, range(6))]
    (tiles,), (shown,) = read_media(store, 0), read_media(store, 2)
    with av.open(str(tmp_path / "v.mp4")) as container:
        numbers = store[0].videos[0].frames
        every = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert np.allclose([(t.mean().item() + 1) * 127.5 for t in tiles], [every[n] for n in numbers], atol=3)
    assert len({round(t.mean().item(), 3) for t in shown}) == 6
    shutil.move(tmp_path / "store", tmp_path / "moved")
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    assert (read_media(SampleStore(tmp_path / "moved"), 2)[0] == shown).all()
    assert (read_media(SampleStore(tmp_path / "moved"), 0)[0] == tiles).all()


def test_documents(tmp_path, tokenizer_dir):
    """A PDF file inside a table is shown page by page, and goes into the store once."""
    pdf = make_pdf(tmp_path / "a.pdf", 3).read_bytes()
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    turns = [{"from": "human", "value": "<document>?"}, {"from": "gpt", "value": "Pages."}]
    rows = [{"document": {"bytes": pdf, "path": None}, "conversations": turns}]
    write_parquet(tmp_path / "t.parquet", rows, {"document": IMAGE, "conversations": pa.list_(turn)})
    store = make(write_recipe(tmp_path, a={"annotation": "t.parquet"}), tmp_path / "store", tokenizer_dir)
    assert members(tmp_path / "store") == [pdf]
    as_file = {"document": "a.pdf", "conversations": turns}
    (tmp_path / "f.jsonl").write_text(json.dumps(as_file) + "\n")
    other = make(write_recipe(tmp_path, a={"annotation": "f.jsonl"}), tmp_path / "other", tokenizer_dir)
    pages = [read_media(s, 0) for s in (store, other)]
    assert len(pages[0]) == 3 and all((a == b).all() for a, b in zip(*pages, strict=True))
    assert (store[0].ids == other[0].ids).all() and not (pages[0][0] == pages[0][1]).all()


def test_transcoding(tmp_path):
    """Videos inside tables are copied like others; pictures stay where they are."""
    clip = make_video(tmp_path / "v.mp4", 12).read_bytes()
    turn = pa.struct({"from": pa.string(), "value": pa.string()})
    turns = [{"from": "human", "value": "<video><image>?"}, {"from": "gpt", "value": "A clip."}]
    rows = [{"video": {"bytes": clip, "path": "v.mp4"}, "image": held(1), "conversations": turns}]
    types = {"video": IMAGE, "image": IMAGE, "conversations": pa.list_(turn)}
    write_parquet(tmp_path / "t.parquet", rows, types)
    arguments = ("--output", tmp_path / "out", "--size", 32, "--gop", 4)
    done = call_tool("preprocess_data", "transcode", tmp_path / "t.parquet", *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (tmp_path / "out" / "t.parquet.jsonl").read_text().splitlines())
    assert line["video"].startswith(str(tmp_path / "out")) and line["video"].endswith(".mp4")
    assert content(line["image"]) == picture(1)
    assert frame_times(line["video"]) == frame_times(str(tmp_path / "v.mp4"))


def frame_times(path):
    with av.open(path) as container:
        return [frame.time for frame in container.decode(video=0)]


def test_lint(tmp_path, recipe):
    """Pictures inside tables are checked; the form is said."""
    found = call_tool("preview_data", "lint", recipe)
    assert found.returncode == 1 and "37 lines, 1 with a problem; unreadable image: 1" in found.stdout
    assert "b.parquet: parquet, 3 row groups, 12 records, read as texts (12)" in found.stdout
    assert "data-00000-of-00002.arrow: Arrow, 3 batches, 3 records, read as messages (3)" in found.stdout
    assert f"{tmp_path}/b.parquet:6: unreadable image" in found.stdout


def test_unknown_columns_stop_the_run_once(tmp_path, tokenizer_dir):
    """Files of one layout are looked at once, however many they are."""
    for i in range(3):
        rows = [{"caption": "A.", "image": held(k), "depth_map": b"\0"} for k in range(4)]
        write_parquet(tmp_path / f"a{i}.parquet", rows, {"image": IMAGE})
    recipe = write_recipe(tmp_path, a={"annotation": "*.parquet"})
    output = ("--tokenizer", tokenizer_dir, "--output", tmp_path / "store", "--max-tokens", 300)
    failed = call_tool("preprocess_data", "run", "--recipe", recipe, *output, "--tile-size", 28)
    assert failed.returncode == 2
    assert 'entry "a": unknown key "depth_map" of a record, 4 times' in failed.stdout

"""Documents as page images, pictures in LMDB databases, settings of single samples: from line to pixels."""

import io
import json
import pickle

import pytest
import torch
from PIL import Image

from megatron_eagle.data.inspection.preview import describe_row
from megatron_eagle.data.media.addresses import databases
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.text.tokenizer import load_tokenizer
from megatron_eagle.problems import Problem
from tests.data.helpers import call_tool, conversation, make_image, make_store, make_video, read_media


def test_pages_are_labelled_pictures(tmp_path, tokenizer_dir):
    for k in range(5):
        make_image(tmp_path / f"{k}.png", (28 + k, 40), seed=k)
    make_image(tmp_path / "photo.png", (30, 30), seed=9)
    record = conversation(
        "<document> and <image> and <document>?",
        "Pages.",
        document=[["0.png", "1.png", "2.png"], ["3.png", "4.png"]],
        image="photo.png",
    )
    one_page = conversation("<document>?", "A page.", document=["0.png"])
    path = make_store(tmp_path, tokenizer_dir, [record, one_page], (2000,), sampling={"max_tiles": 1})
    store = SampleStore(path)
    text = load_tokenizer(tokenizer_dir).decode(store[0].ids.tolist())
    block = "<img><IMG_CONTEXT></img>\n"
    pages = "".join(f"<image {k}>{block}" for k in (2, 3, 4))
    assert f"user\n{pages} and <image 1>{block} and <image 5>{block}<image 6>{block}?<|im_end|>" in text
    assert f"user\n<image 1>{block}?" in load_tokenizer(tokenizer_dir).decode(store[1].ids.tolist())
    tiles = torch.cat(read_media(store, 0))
    shown = ["0.png", "1.png", "2.png", "photo.png", "3.png", "4.png"]
    for tile, name in zip(tiles, shown, strict=True):
        image = load_image(str(tmp_path / name)).resize((28, 28), Image.Resampling.BICUBIC)
        assert (tile.mean() - (torch.tensor(list(image.getdata())).float().mean() / 127.5 - 1)).abs() < 0.02
    facts = describe_row(store, 0)
    assert [image["path"] for image in facts["images"]] == [str(tmp_path / "photo.png")]
    assert [document["pages"] for document in facts["documents"]] == [[0, 1, 2], [0, 1]]
    assert facts["documents"][1]["images"][0]["path"] == str(tmp_path / "3.png")


def test_pages_are_given_up_and_counted(tmp_path, tokenizer_dir):
    make_image(tmp_path / "page.png", (40, 56))
    record = conversation("<document>", "x", document=["page.png"] * 40)
    path = make_store(tmp_path, tokenizer_dir, [record], (200, 2000))
    short, long = (SampleStore(path, length)[0].documents[0] for length in (200, 2000))
    assert long.pages == tuple(range(40))
    assert short.n_pages == 40 > len(short.pages) > 5
    assert (short.pages[0], short.pages[-1]) == (0, 39)
    counts = SampleStore(path, 200).manifest.counts["200"]
    assert (counts["pages_kept"], counts["pages_wanted"]) == (len(short.pages), 40)
    assert write_packs(path, 200, 0).n_packs == 1


def test_settings_of_one_sample(tmp_path, tokenizer_dir):
    make_video(tmp_path / "v.mp4", 60, fps=10)
    make_image(tmp_path / "wide.png", (448, 112))
    settings = [
        {},
        {"fps": 1},
        {"max_frames": 5},
        {"fps": 0.1, "min_frames": 3},
        {"fps": 20, "max_frames": 60},
    ]
    records = [conversation("<video>", "x", video="v.mp4", **s) for s in settings]
    tiles = [{}, {"max_tiles": 4}, {"max_tiles": 20}, {"max_dynamic_tiles": 1}]
    records += [conversation("<image>", "x", image="wide.png", **s) for s in tiles]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records, (3000,), sampling={"max_tiles": 12}))
    assert [store[i].n_frames for i in range(5)] == [12, 8, 5, 3, 60]
    assert [store[i].images[0].columns * store[i].images[0].rows for i in range(5, 9)] == [12, 4, 16, 1]


def png(size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


class FakeDatabase:
    """What `source` uses of an open LMDB database."""

    def __init__(self, values):
        self.values = values

    def begin(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get(self, key):
        return self.values.get(key)


VALUES = {b"good": png((56, 28)), b"empty": b"", b"pickle": pickle.dumps({"image": b""}), b"text": b"hello"}
LMDB_EXPECTED = {
    "good": None,
    "empty": "empty file",
    "pickle": "unsafe media",
    "text": "unreadable image",
    "none": "missing media",
}


def lmdb_store(tmp_path, tokenizer_dir):
    records = [
        conversation("<image>", "x", image={"lmdb_file": "db", "lmdb_key": key}) for key in LMDB_EXPECTED
    ]
    path = make_store(tmp_path, tokenizer_dir, records, (300,))
    ledger = [json.loads(line) for line in (path / "dropped.jsonl").open()]
    return path, {entry["line"]: entry for entry in ledger}


def check_lmdb_store(path, ledger):
    expected = {line: kind for line, kind in enumerate(LMDB_EXPECTED.values(), 1) if kind}
    assert {line: entry["kind"] for line, entry in ledger.items()} == expected
    assert "pickle, which is never read" in ledger[3]["reason"]
    store = SampleStore(path)
    assert len(store) == 1
    assert (store[0].images[0].columns, store[0].images[0].rows) == (2, 1)
    assert read_media(store, 0)[0].shape == (3, 3, 28, 28)


def test_pictures_in_a_database(tmp_path, tokenizer_dir, monkeypatch):
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "data.mdb").touch()
    values = dict(VALUES)
    with monkeypatch.context() as patch:
        patch.setattr(databases, "_environment", lambda file: FakeDatabase(values))
        path, ledger = lmdb_store(tmp_path, tokenizer_dir)
        check_lmdb_store(path, ledger)
        values[b"good"] += b"\0"
        with pytest.raises(Problem, match="media changed since preprocessing: lmdb://.*db.good has"):
            read_media(SampleStore(path), 0)


def test_pictures_in_a_real_database(tmp_path, tokenizer_dir):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db")) as database, database.begin(write=True) as transaction:
        for key, value in VALUES.items():
            transaction.put(key, value)
    check_lmdb_store(*lmdb_store(tmp_path, tokenizer_dir))


def test_without_lmdb_the_ledger_says_so(tmp_path, tokenizer_dir, monkeypatch):
    (tmp_path / "db").touch()
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    _, ledger = lmdb_store(tmp_path, tokenizer_dir)
    assert ledger[1]["reason"] == f"lmdb not installed: {tmp_path}/db needs it: pip install lmdb"


def test_the_report_of_data_sets(tmp_path, tokenizer_dir):
    make_image(tmp_path / "wide.png", (112, 56))
    make_video(tmp_path / "v.mp4", 90)
    (tmp_path / "a.jsonl").write_text(json.dumps(conversation("<image>", "x", image="wide.png")) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(conversation("<video>", "x", video="v.mp4")) + "\n")
    (tmp_path / "r.json").write_text(
        '{"pictures": {"annotation": "a.jsonl"}, "clips": {"annotation": "b.jsonl"}}'
    )
    done = call_tool(
        "preprocess_data",
        "run",
        "--recipe",
        tmp_path / "r.json",
        "--tokenizer",
        tokenizer_dir,
        "--output",
        tmp_path / "s",
        "--max-tokens",
        150,
        400,
        "--tile-size",
        28,
        "--report",
        tmp_path / "report.png",
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("pictures", "clips"))]
    assert rows == [
        ["pictures", "150", "1", "0", "0", "-", "9", "9", "100.0", "0", "0", "-"],
        ["clips", "150", "1", "18", "10", "55.6", "0", "0", "-", "0", "0", "-"],
        ["pictures", "400", "1", "0", "0", "-", "9", "9", "100.0", "0", "0", "-"],
        ["clips", "400", "1", "18", "18", "100.0", "0", "0", "-", "0", "0", "-"],
    ]
    assert Image.open(tmp_path / "report.png").size[0] > 300

"""From a recipe to a store: every line is kept or in the ledger, the same whoever made it."""

import json

import numpy as np
import pytest

from megatron_eagle.data.media import frame_index
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.data.preparation import preprocess as preprocess_module
from megatron_eagle.data.preparation.preprocess import preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from tests.data.helpers import (
    contents,
    conversation,
    frame_number,
    make_image,
    make_store,
    make_video,
    run_tool,
    write_jsonl,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media: a wide picture, a small one, a 9 s clip, and broken ones."""
    folder = tmp_path_factory.mktemp("media")
    make_image(folder / "wide.png", (112, 56))
    make_image(folder / "small.jpg", (20, 20), seed=1)
    make_video(folder / "clip.mp4", 90)
    (folder / "zero.jpg").touch()
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:2000])
    return folder


RECORDS = [
    conversation("<image>What is this?", "A cat.", image="wide.png"),
    conversation("<video>What is shown?", "A cup.", video="clip.mp4"),
    "",
    "{broken",
    conversation("Hello", "Hi"),
    conversation("<image>", "x", image="zero.jpg"),
    conversation("<image>", "x", image="none.jpg"),
    conversation("<video>", "x", video="cut.mp4"),
    conversation("very long " * 400, "x"),
    conversation("<image> and <image>", "Two.", image=["small.jpg", "wide.png"]),
]


def test_everything_is_kept_or_in_the_ledger(folder, tokenizer_dir):
    store_path = make_store(folder, tokenizer_dir, RECORDS, (220, 2000), sampling={"min_frames": 2})
    ledger = [json.loads(line) for line in (store_path / "dropped.jsonl").open()]
    assert {entry["file"] for entry in ledger} == {str(folder / "data.jsonl")}
    found = [(entry["line"], entry["kind"], entry["length"]) for entry in ledger]
    assert found == [
        (3, "empty line", None),
        (4, "broken JSON", None),
        (6, "empty file", None),
        (7, "missing media", None),
        (8, "truncated video", None),
        (9, "too long", 220),
        (9, "too long", 2000),
    ]
    short, long = (SampleStore(store_path, length) for length in (220, 2000))
    for store in (short, long):
        counts = store.manifest.counts[str(store.length)]
        assert counts["input"] == len(RECORDS) == counts["kept"] + sum(counts["dropped"].values())
        assert counts["rows"] == len(store) == 4
        assert [store[i].line for i in range(4)] == [1, 2, 5, 10]
    assert short.manifest.counts["220"]["lost_frames"] == 1
    assert long.manifest.counts["2000"]["lost_frames"] == 0
    assert len(short[1].videos[0].frames) < len(long[1].videos[0].frames) == 18


def test_a_row_is_complete(folder, tokenizer_dir, tokenizer):
    store = SampleStore(make_store(folder, tokenizer_dir, RECORDS, (2000,)))
    sample = store[0]
    assert sample.file == str(folder / "data.jsonl")
    assert len(sample.ids) == len(sample.answers) == sample.n_tokens == sample.n_text + sample.n_visual
    image = sample.images[0]
    assert (image.path, image.width, image.height) == (str(folder / "wide.png"), 112, 56)
    assert (image.columns, image.rows, image.n_tiles) == (4, 2, 9)
    assert sample.n_visual == sample.n_tiles == 9 == (sample.ids == store.manifest.image_token_id).sum()
    assert tokenizer.decode(sample.ids[sample.answers == 1].tolist()) == "A cat.<|im_end|>"
    assert sample.answer_lengths == (sample.n_supervised,) == ((sample.answers == 1).sum(),)
    video = store[1].videos[0]
    assert video.frames == tuple(np.linspace(0, 89, 18).round().astype(int))
    assert video.times == pytest.approx([k / 10 for k in video.frames])
    assert video.duration_num / video.duration_den == 9
    assert store[3].media_order == (0, 1)
    with pytest.raises(IndexError):
        store[4]


def test_training_needs_no_frame_table(tmp_path, tokenizer_dir, monkeypatch):
    """What the store keeps of a video is enough to decode its frames; the container is not read again."""
    files = ("a.mp4", "b.mkv", "c.ts")
    for name in files:
        make_video(tmp_path / name, 40, gop=7)
    records = [conversation("<video>", "x", video={"video": name, "start": 0.5}) for name in files]
    store = SampleStore(make_store(tmp_path, tokenizer_dir, records))
    videos = [store[row].videos[0] for row in range(len(files))]
    assert all(video.frames[0] > 0 for video in videos)

    def parsed(*_):
        raise AssertionError("the container's frames were read")

    monkeypatch.setattr(frame_index, "read_mp4", parsed)
    monkeypatch.setattr(frame_index, "demux", parsed)
    for video in videos:
        some = video.frames[1::2]  # a rank's share
        tiles, times = decode_frames(video.path, video.index, some, size=64)
        assert [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles] == list(some)
        assert times.tolist() == video.times[1::2]


def test_output_does_not_depend_on_the_workers(folder, tokenizer_dir):
    records = RECORDS * 5
    one = contents(make_store(folder, tokenizer_dir, records, (300,)))
    two = contents(make_store(folder, tokenizer_dir, records, (300,), workers=2))
    assert one == two


def test_repeat_time_repeats_rows_without_their_bytes(folder, tokenizer_dir):
    once = SampleStore(make_store(folder, tokenizer_dir, RECORDS, (300,)))
    ids = [once[i].ids.tolist() for i in range(4)]
    size = (once.folder / "tokens.bin").stat().st_size
    thrice = SampleStore(make_store(folder, tokenizer_dir, RECORDS, (300,), recipe={"repeat_time": 3}))
    assert [thrice[i].ids.tolist() for i in range(12)] == ids * 3
    assert [thrice[i].line for i in range(12)] == [1, 2, 5, 10] * 3
    assert (thrice.folder / "tokens.bin").stat().st_size == size
    half = make_store(folder, tokenizer_dir, RECORDS, (300,), recipe={"repeat_time": 0.5})
    counts = SampleStore(half).manifest.counts["300"]
    assert counts["not_taken"] == 5
    assert counts["input"] == 10 == 5 + counts["kept"] + sum(counts["dropped"].values())


def test_megatron_reads_the_token_files(folder, tokenizer_dir):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    path = make_store(folder, tokenizer_dir, RECORDS, (300,), recipe={"repeat_time": 1.5})
    store = SampleStore(path)
    for name, field in (("tokens", "ids"), ("answers", "answers")):
        theirs = IndexedDataset(str(path / "300" / name))
        assert len(theirs) == len(store)
        for row in range(len(store)):
            np.testing.assert_array_equal(theirs[row], getattr(store[row], field))
            assert theirs[row].dtype == getattr(store[row], field).dtype


def test_interrupted_runs_leave_the_old_output(folder, tokenizer_dir, monkeypatch):
    path = make_store(folder, tokenizer_dir, RECORDS, (300,))
    before = contents(path)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "write_ledger", fail)
        with pytest.raises(KeyboardInterrupt):
            make_store(folder, tokenizer_dir, RECORDS[:1], (300,))
    assert contents(path) == before
    assert len(SampleStore(make_store(folder, tokenizer_dir, RECORDS[:1], (300,)))) == 1
    assert not list(folder.glob(".store*"))


def test_somebody_elses_folder_is_not_replaced(folder, tokenizer_dir, tmp_path):
    (tmp_path / "thesis.txt").write_text("!")
    write_jsonl(folder / "data.jsonl", RECORDS)
    settings = PreprocessSettings(str(tokenizer_dir), (300,))
    with pytest.raises(UserError, match="holds something else than a token store"):
        preprocess(folder / "recipe.json", tmp_path, settings)
    assert (tmp_path / "thesis.txt").exists()


def test_impossible_settings_are_refused(tokenizer_dir):
    with pytest.raises(UserError, match="multiple of twice the patch size, got 448 and 15"):
        PreprocessSettings(str(tokenizer_dir), (300,), patch_size=15)
    with pytest.raises(UserError, match="--max-tokens"):
        PreprocessSettings(str(tokenizer_dir), (300, 300))


def test_the_command_line_shows_what_happened(folder, tokenizer_dir, tmp_path):
    write_jsonl(folder / "cli.jsonl", RECORDS)
    (folder / "cli.yaml").write_text("cli: {annotation: cli.jsonl}")
    fixed = ("--tokenizer", tokenizer_dir, "--output", tmp_path / "d", "--tile-size", 28)
    done = run_tool(
        "preprocess_data", "run", "--recipe", folder / "cli.yaml", *fixed, "--max-tokens", 120, 400
    )
    assert done.returncode == 0, done.stderr
    lines = {line[:38].strip(): line[38:].split() for line in done.stdout.splitlines()}
    assert lines["token limit"] == ["120", "400"]
    assert lines["kept"] == ["3", "4"]
    assert lines["dropped"] == ["7", "6"]
    assert lines["too long"] == ["2", "1"]
    assert lines["frames kept"] == ["0", "of", "0", "18", "of", "18"]
    assert "preprocess: 100%" in done.stderr

    missing = run_tool("preprocess_data", "run", "--recipe", "no.json", *fixed, "--max-tokens", 200)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: cannot read the recipe no.json")
    assert "Traceback" not in missing.stderr

    shown = run_tool("preview_data", "show", tmp_path / "d", "--sample", 1, "--json")
    sample = json.loads(shown.stdout)
    assert list(sample) == [
        "source",
        "n_tokens",
        "n_text",
        "n_visual",
        "n_supervised",
        "images",
        "documents",
        "videos",
        "input_ids",
        "loss_weights",
    ]
    assert sample["source"] == {"file": str(folder / "cli.jsonl"), "line": 2}
    assert sample["videos"][0]["frames"][0] == 0
    assert sample["videos"][0]["times"][-1] == 8.9
    weights = [w for w in sample["loss_weights"] if w]
    assert weights == pytest.approx([sample["n_supervised"] ** -0.5] * sample["n_supervised"])
    outside = run_tool("preview_data", "show", tmp_path / "d", "--sample", 9, "--json")
    assert (outside.returncode, outside.stderr) == (
        2,
        f"error: {tmp_path}/d has rows 0 to 3 at length 400, no row 9\n",
    )
    picture = json.loads(run_tool("preview_data", "show", tmp_path / "d", "--sample", 0, "--json").stdout)
    assert picture["images"] == [
        {"path": str(folder / "wide.png"), "grid": [4, 2], "thumbnail": True, "n_tiles": 9}
    ]

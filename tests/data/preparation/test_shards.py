"""Stores made of WebDataset and Energon archives, which are read where they lie: what JSON lines give."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_eagle.data.annotations.mixture import read_recipe
from megatron_eagle.data.preparation import archives
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from tests.data.annotations.test_shards import prepared, write
from tests.data.helpers import (
    call_tool,
    contents,
    conversation,
    make_image,
    make_pdf,
    make_video,
    read_media,
    write_jsonl,
)


def samples(folder: Path) -> list[dict[str, object]]:
    """The parts of each sample, media as their files."""
    made = {f"{k}.png": make_image(folder / f"{k}.png", (30 + 9 * k, 40), k) for k in range(4)}
    made["v.mp4"] = make_video(folder / "v.mp4", 20)
    made["d.pdf"] = make_pdf(folder / "d.pdf", 2)
    return [
        {"png": made["0.png"], "json": conversation("<image>Which?", "The first.")},
        {
            "img_10.png": made["1.png"],
            "img_9.png": made["2.png"],
            "json": conversation("<image><image>?", "2."),
        },
        {"mp4": made["v.mp4"], "json": conversation("<video>What moves?", "Bars.", fps=4)},
        {"pdf": made["d.pdf"], "json": conversation("<document>Read.", "Read.")},
        {"png": made["3.png"], "txt": "A caption."},
        {"json": conversation("No picture?", "None.")},
        {"png": made["0.png"], "json": "{broken"},
    ]


def as_lines(parts: dict[str, object]) -> object:
    """The same sample as a line that names files."""
    if parts.get("json") == "{broken":
        return "{broken"
    record = dict(parts.get("json") or {"caption": parts["txt"]})
    for key, suffix in (("images", ".png"), ("videos", ".mp4"), ("documents", ".pdf")):
        named = [str(path) for part, path in parts.items() if f".{part}".endswith(suffix)]
        if named:
            record[key] = named[::-1]  # img_9 comes before img_10
    return record


def shards(folder: Path, all_parts: list[dict[str, object]], per_shard: int = 4) -> None:
    for number, first in enumerate(range(0, len(all_parts), per_shard)):
        members = [
            (f"{first + k:05d}.{part}", content.read_bytes() if isinstance(content, Path) else content)
            for k, parts in enumerate(all_parts[first : first + per_shard])
            for part, content in parts.items()
        ]
        write(folder / f"shard-{number:03d}.tar", members)


def run(folder: Path, tokenizer: Path, entry: dict, workers: int = 1, name: str = "store", **more) -> Path:
    (folder / "recipe.json").write_text(json.dumps({"d": entry}))
    settings = PreprocessSettings(str(tokenizer), (256,), SamplingSettings(tile_size=28, max_frames=8))
    preprocess(folder / "recipe.json", folder / name, settings, Execution(workers, **more))
    return folder / name


def rows(store: SampleStore) -> list:
    """The rows without what names their media and where they come from."""
    found = []
    for sample in map(store.__getitem__, range(len(store))):
        images, videos = (
            tuple(replace(medium, path="", mtime_ns=0) for medium in kind)
            for kind in (sample.images, sample.videos)
        )
        arrays = (sample.ids.tobytes(), sample.answers.tobytes())
        plain = replace(sample, images=images, videos=videos, ids=0, answers=0, file="", line=0, source=0)
        found.append((plain, arrays))
    return found


def kinds(store: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (store / "dropped.jsonl").read_text().splitlines()]


def test_the_same_as_json_lines(tmp_path, tokenizer_dir):
    """Rows, ledger and pixels; by any number of workers, and from a folder that may not be written."""
    (tmp_path / "files").mkdir()
    all_parts = samples(tmp_path / "files")
    write_jsonl(tmp_path / "lines.jsonl", [as_lines(parts) for parts in all_parts])
    plain = run(tmp_path, tokenizer_dir, {"annotation": "lines.jsonl"}, name="plain")
    shards(tmp_path / "wds", all_parts)
    os.chmod(tmp_path / "wds", 0o555)
    entry = {"annotation": "wds/shard-{000..001}.tar"}
    store = run(tmp_path, tokenizer_dir, entry)
    os.chmod(tmp_path / "wds", 0o755)
    assert rows(SampleStore(store)) == rows(SampleStore(plain)) and len(SampleStore(store)) == 6
    assert kinds(store) == kinds(plain) == ["broken JSON"]
    for row in range(6):
        pairs = zip(read_media(SampleStore(store), row), read_media(SampleStore(plain), row), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    paths = [image.path for row in range(2) for image in SampleStore(store)[row].images]
    assert all(path.startswith(f"tar://{tmp_path}/wds/shard-000.tar?offset=") for path in paths)
    assert SampleStore(store)[4].file.endswith("shard-001.tar") and SampleStore(store)[4].line == 1
    before = contents(store)
    assert contents(run(tmp_path, tokenizer_dir, entry, workers=2, fresh=True)) == before
    shutil.rmtree(tmp_path / ".store.archives")
    for named in ("wds", "wds/*.tar", ["wds/shard-000.tar", "wds/shard-001.tar"]):
        again = run(tmp_path, tokenizer_dir, {"annotation": named}, fresh=True)
        assert rows(SampleStore(again)) == rows(SampleStore(plain)), named
    assert sorted(path.name for path in (tmp_path / "wds").iterdir()) == ["shard-000.tar", "shard-001.tar"]


def test_a_store_follows_from_its_shards(tmp_path, tokenizer_dir, capsys):
    folder = prepared(tmp_path / "e")
    for number in range(3):
        members = []
        for k in range(3):
            picture = make_image(tmp_path / "p.png", (28, 28), 3 * number + k)
            members += [(f"{number}{k}.jpg", picture.read_bytes()), (f"{number}{k}.txt", f"{number}{k}")]
        write(folder / f"shards/s_{number:03d}.tar", members)
    entry = {"annotation": "e", "split": "train"}
    store = run(tmp_path, tokenizer_dir, entry)
    assert len(SampleStore(store)) == 6 and "up to date" not in capsys.readouterr().out
    run(tmp_path, tokenizer_dir, entry)
    assert "up to date" in capsys.readouterr().out
    (folder / ".nv-meta/split.yaml").write_text(
        "split_parts: {train: ['shards/s_{000..001}.tar'], val: [shards/s_002.tar]}\n"
        "exclude: [shards/s_001.tar/11]\n"
    )
    run(tmp_path, tokenizer_dir, entry)
    assert len(SampleStore(store)) == 5 and "up to date" not in capsys.readouterr().out
    with pytest.raises(UserError, match="holds the splits train, val"):
        run(tmp_path, tokenizer_dir, {"annotation": "e"})
    lint = call_tool("preview_data", "lint", tmp_path / "recipe.json")
    assert lint.returncode == 2 and "e.g. split: train" in lint.stderr


def test_commands(tmp_path, tokenizer_dir):
    """Lint says how a shard was read and what is wrong in it, mix counts, transcode names its copies."""
    (tmp_path / "files").mkdir()
    shards(tmp_path / "wds", samples(tmp_path / "files"))
    (tmp_path / "recipe.json").write_text('{"d": {"annotation": "wds"}}')
    lint = call_tool("preview_data", "lint", tmp_path / "recipe.json")
    assert "shard-000.tar: WebDataset, 4 records, read as ShareGPT (4)" in lint.stdout
    assert "shard-001.tar:3: broken JSON" in lint.stdout and "7 lines, 1 with a problem" in lint.stdout
    mix = call_tool("preview_data", "mix", tmp_path / "recipe.json")
    assert mix.returncode == 0 and " 7 " in mix.stdout
    small = call_tool(
        "preprocess_data", "transcode", tmp_path / "recipe.json", "--output", tmp_path / "out", "--size", 32
    )
    assert small.returncode == 0, small.stderr
    (copy,) = (tmp_path / "out/videos").rglob("*.mp4")
    store = run(tmp_path / "out", tokenizer_dir, json.loads((tmp_path / "out/recipe.json").read_text())["d"])
    assert len(SampleStore(store)) == 6 and SampleStore(store)[2].videos[0].path == str(copy)
    write(tmp_path / "wds/shard-002.tar", [("x.jpg", b""), ("x.txt", "T."), ("x.cls", "3")])
    failed = call_tool(
        "preprocess_data", "run", "--recipe", tmp_path / "recipe.json", "--tokenizer", tokenizer_dir
    , "--output", tmp_path / "store", "--max-tokens", 256)  # fmt: skip
    assert failed.returncode == 2 and 'unknown key "cls" of a record, 1 times' in failed.stdout
    (tmp_path / "recipe.json").write_text('{"d": {"annotation": "wds", "ignore": ["cls"]}}')
    store = run(tmp_path, tokenizer_dir, {"annotation": "wds", "ignore": ["cls"]})
    assert kinds(store) == ["broken JSON", "empty file"]


def many(folder: Path, n: int) -> dict:
    for k in range(n):
        write(folder / f"wds/{k}.tar", [(f"{k}.json", conversation("Q?", f"{k}."))])
    return {"annotation": "wds"}


def test_many_archives_are_indexed_side_by_side(tmp_path, tokenizer_dir, monkeypatch):
    """Once, before anything is read of them."""
    asked = []

    def inline(function, items, workers):
        asked.append((len(items), workers))
        return [result for item in items for result in function(item)]

    monkeypatch.setattr(archives, "in_processes", inline)
    entry = many(tmp_path, 10)
    store = run(tmp_path, tokenizer_dir, entry, workers=1)
    assert not asked and len(SampleStore(store)) == 10
    shutil.rmtree(tmp_path / ".store.archives")
    datasets = read_recipe(tmp_path / "recipe.json")
    archives.with_archives(datasets, tmp_path / ".store.archives", 3)
    assert asked == [(10, 3)] and len(list((tmp_path / ".store.archives").glob("*.arrow"))) == 10
    archives.with_archives(datasets, tmp_path / ".store.archives", 3)
    assert len(asked) == 1, "they are there"


@pytest.mark.slow
def test_indexes_of_several_processes(tmp_path, tokenizer_dir):
    entry = many(tmp_path, 10)
    one = contents(run(tmp_path, tokenizer_dir, entry))
    shutil.rmtree(tmp_path / ".store.archives")
    assert contents(run(tmp_path, tokenizer_dir, entry, workers=2, fresh=True)) == one
    write(tmp_path / "wds/9.tar", [("x.json", "")]).write_bytes(b"cut")
    shutil.rmtree(tmp_path / ".store.archives")
    with pytest.raises(UserError, match="9.tar is damaged or cut off"):
        run(tmp_path, tokenizer_dir, entry, workers=2)


def test_a_cut_shard_is_one_line(tmp_path, tokenizer_dir):
    (tmp_path / "files").mkdir()
    shards(tmp_path / "wds", samples(tmp_path / "files"))
    last = tmp_path / "wds/shard-001.tar"
    last.write_bytes(last.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"shard-001.tar (is damaged or cut off|has no end mark)"):
        run(tmp_path, tokenizer_dir, {"annotation": "wds"})

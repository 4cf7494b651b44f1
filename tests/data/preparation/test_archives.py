"""Data sets whose media come in archives, from recipe to pixels: what the same files give."""

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from megatron_eagle.data.media import archive_unpack
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.preparation.reuse import is_current
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
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
from tests.full_disk import full_disk

RECORDS = [
    conversation("<image>Which?", "A.", image="coco/a.png"),
    conversation("<image><image>Both?", "B and A.", image=["b c.jpg", "coco/a.png"]),
    conversation("<video>What moves?", "Bars.", video="clips/v.mp4", fps=4),
    conversation("<document>Read it.", "Read.", document="paper.pdf"),
    conversation("<video>Frames?", "Three.", video="frames/one"),
    conversation("<image>Where?", "Nowhere.", image="coco/none.png"),
    conversation("And no picture?", "None."),
]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for name in ("coco", "clips", "frames/one"):
        (folder / name).mkdir(parents=True)
    make_image(folder / "coco/a.png", (60, 30), 1)
    make_image(folder / "b c.jpg", (30, 90), 2)
    for k in (9, 10, 11):
        make_image(folder / f"frames/one/{k}.png", (28, 28), k)
    make_video(folder / "clips/v.mp4", 20)
    make_pdf(folder / "paper.pdf", 2)
    return folder


PACKED = (".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz")


def archive(path: Path, media: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    files = sorted(file for file in media.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as target:
            for file in files:
                target.write(file, file.relative_to(media))
    else:
        with tarfile.open(path, "w") as target:
            for file in files:
                target.add(file, f"./{file.relative_to(media)}")
    return path


def run(folder: Path, tokenizer: Path, root: object, workers: int = 1, **execution) -> Path:
    """Preprocess the records with their media below `root`, into FOLDER/store."""
    write_jsonl(folder / "data.jsonl", RECORDS)
    (folder / "recipe.json").write_text(json.dumps({"d": {"annotation": "data.jsonl", "root": root}}))
    settings = PreprocessSettings(str(tokenizer), (256,), SamplingSettings(tile_size=28, max_frames=8))
    preprocess(folder / "recipe.json", folder / "store", settings, Execution(workers, **execution))
    return folder / "store"


def rows(path: Path) -> list:
    """The rows of a store without what names its media, and the ledger's kinds by line."""
    found = []
    for sample in map(SampleStore(path).__getitem__, range(len(SampleStore(path)))):
        images, videos = (
            tuple(replace(medium, path="", mtime_ns=0) for medium in kind)
            for kind in (sample.images, sample.videos)
        )
        arrays = (sample.ids.tobytes(), sample.answers.tobytes())
        found.append((replace(sample, images=images, videos=videos, ids=0, answers=0, file=""), arrays))
    ledger = [json.loads(line) for line in (path / "dropped.jsonl").read_text().splitlines()]
    return [found, [(entry["line"], entry["kind"]) for entry in ledger]]


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_an_archive_is_as_good_as_its_files(tmp_path, tokenizer_dir, media, suffix):
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
    plain = run(tmp_path / "plain", tokenizer_dir, str(media))
    root = archive(tmp_path / f"media{suffix}", media)
    store = run(tmp_path / "packed", tokenizer_dir, str(root))
    expected, found = rows(plain), rows(store)
    assert found == expected and len(found[0]) == 6 and found[1] == [(6, "missing media")]
    sources = {image.path.split(":")[0] for image in SampleStore(store)[0].images}
    assert sources == {suffix[1:]}
    for row in range(6):
        pairs = zip(read_media(SampleStore(store), row), read_media(SampleStore(plain), row), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    # Neither the number of workers nor an index that is there already changes a byte.
    before = contents(store)
    workers = 2 if suffix == ".tar" else 1
    assert contents(run(tmp_path / "packed", tokenizer_dir, str(root), workers, fresh=True)) == before
    assert [file.name for file in tmp_path.iterdir()].count(".store.archives") == 0
    assert len(list((tmp_path / "packed/.store.archives").iterdir())) == 1


def test_compressed_members_go_into_the_store(tmp_path, tokenizer_dir, media):
    """Once each: training unpacks nothing, and needs the archive no more."""
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain", tokenizer_dir, str(media))
    root = archive(tmp_path / "media.zip", media, zipfile.ZIP_DEFLATED)
    store = run(tmp_path, tokenizer_dir, "media.zip")
    assert rows(store) == rows(plain)
    assert is_current(store, SampleStore(store).manifest.input_key)
    root.unlink()
    for row in range(6):
        pairs = zip(read_media(SampleStore(store), row), read_media(SampleStore(plain), row), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    (kept,) = (store / "media").iterdir()
    with tarfile.open(kept) as own:
        assert len(own.getmembers()) == 7, "the picture that two samples show is there once"


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_archives_are_unpacked_once(tmp_path, tokenizer_dir, media, suffix):
    """What is used of them goes into the store, and nothing else stays."""
    (tmp_path / "plain").mkdir()
    plain = run(tmp_path / "plain", tokenizer_dir, str(media))
    pack(archive(tmp_path / "media.tar", media), tmp_path / f"media{suffix}")
    store = run(tmp_path, tokenizer_dir, f"media{suffix}")
    assert rows(store) == rows(plain)
    assert not list((tmp_path / ".store.archives").iterdir())
    reason = json.loads((store / "dropped.jsonl").read_text())["reason"]
    assert reason == f"missing media: {tmp_path}/media{suffix} has no member coco/none.png"
    (tmp_path / f"media{suffix}").unlink()
    for row in (0, 2):
        pairs = zip(read_media(SampleStore(store), row), read_media(SampleStore(plain), row), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def pack(plain: Path, packed: Path) -> None:
    data = plain.read_bytes()
    plain.unlink()
    if packed.suffix == ".zst":
        with pa.output_stream(str(packed), compression="zstd") as file:
            file.write(data)
    else:
        how = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packed.suffix]
        packed.write_bytes(how(data))


def test_packed_archives_that_are_not_used(tmp_path, tokenizer_dir, media, monkeypatch):
    archive(tmp_path / "media.tar", media)
    data = gzip.compress((tmp_path / "media.tar").read_bytes())
    for content, match in (
        (data[: len(data) // 2], "is damaged or cut off .*; fetch it again"),
        (data[:20] + b"junk" + data[24:], "is damaged or cut off .*; fetch it again"),
        (gzip.compress(b'{"no": "archive"}'), "is packed with gzip, and is no tar archive"),
    ):
        (tmp_path / "media.tgz").write_bytes(content)
        with pytest.raises(UserError, match=match):
            run(tmp_path, tokenizer_dir, "media.tgz")
        assert not list((tmp_path / ".store.archives").iterdir())
    monkeypatch.setattr(archive_unpack, "_ALWAYS", 1000)
    (tmp_path / "media.tgz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(UserError, match="holds more than 100 times its own size"):
        run(tmp_path, tokenizer_dir, "media.tgz")
    (tmp_path / "media.tgz").write_bytes(data)
    lint = call_tool("preview_data", "lint", tmp_path / "recipe.json")
    assert "7 lines, 1 with a problem" in lint.stdout
    settings = PreprocessSettings(str(tokenizer_dir), (256,), SamplingSettings(tile_size=28))
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*\.store\.archives/"):
        preprocess(tmp_path / "recipe.json", tmp_path / "store", settings, Execution(1))


def test_a_store_follows_from_its_archives(tmp_path, tokenizer_dir, media, capsys):
    root = archive(tmp_path / "media.tar", media)
    store = run(tmp_path, tokenizer_dir, "media.tar")
    key = SampleStore(store).manifest.input_key
    assert is_current(store, key)
    run(tmp_path, tokenizer_dir, "media.tar")
    assert "is up to date" in capsys.readouterr().out
    os.utime(root, ns=(1, 1))
    assert not is_current(store, key)
    with tarfile.open(root, "a") as target:
        target.add(media / "coco/a.png", "coco/none.png")
    run(tmp_path, tokenizer_dir, "media.tar")
    assert len(SampleStore(store)) == 7


def test_commands(tmp_path, tokenizer_dir, media):
    """Lint, a preview and small copies of videos, whose recipe reads the archive's pictures."""
    archive(tmp_path / "media.zip", media)
    store = run(tmp_path, tokenizer_dir, "media.zip")
    lint = call_tool("preview_data", "lint", tmp_path / "recipe.json")
    assert "7 lines, 1 with a problem" in lint.stdout and "has no member coco/none.png" in lint.stdout
    page = tmp_path / "page.html"
    shown = call_tool("preview_data", "show", store, "--sample", 2, "--html", page)
    assert shown.returncode == 0, shown.stderr
    assert page.read_text().count("<figure>") == 8 and "media.zip" in page.read_text()
    small = call_tool(
        "preprocess_data", "transcode", tmp_path / "recipe.json", "--output", tmp_path / "out", "--size", 32
    )
    assert small.returncode == 0, small.stderr
    (copy,) = (tmp_path / "out/videos").rglob("*.mp4")
    lines = [json.loads(line) for line in (tmp_path / "out/d.jsonl").read_text().splitlines()]
    assert lines[2]["video"] == str(copy) and lines[0] == RECORDS[0]
    settings = PreprocessSettings(str(tokenizer_dir), (256,), SamplingSettings(tile_size=28, max_frames=8))
    preprocess(tmp_path / "out/recipe.json", tmp_path / "again", settings, Execution(1))
    again = SampleStore(tmp_path / "again")
    assert len(again) == 6 and again[2].videos[0].path == str(copy)
    assert again[0].images == SampleStore(store)[0].images


def test_a_broken_archive_is_one_line(tmp_path, tokenizer_dir, media):
    root = archive(tmp_path / "media.tar", media)
    root.write_bytes(root.read_bytes()[:-12000])
    write_jsonl(tmp_path / "data.jsonl", RECORDS)
    (tmp_path / "recipe.json").write_text('{"d": {"annotation": "data.jsonl", "root": "media.tar"}}')
    for tool, *arguments in (
        ("preprocess_data", "run", "--recipe", tmp_path / "recipe.json", "--tokenizer", tokenizer_dir)
        + ("--output", tmp_path / "store", "--max-tokens", 256),
        ("preview_data", "lint", tmp_path / "recipe.json"),
        ("preprocess_data", "transcode", tmp_path / "recipe.json", "--output", tmp_path / "out"),
    ):
        result = call_tool(tool, *arguments)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert last.startswith("error: ") and "media.tar is damaged or cut off" in last

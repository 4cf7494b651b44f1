"""From annotations that name remote media to the pixels of training: the same as from files."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_eagle.data.inspection.preview_html import sample_page
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from tests.data.helpers import (
    call_tool,
    conversation,
    every_tile,
    make_image,
    make_pdf,
    make_video,
    write_jsonl,
)
from tests.full_disk import full_disk

RECORDS = [
    conversation("<image>What?", "A picture.", image="a b.png"),
    conversation("<video>What?", "A video.", video="sub/clip.mp4"),
    conversation("<video>What?", "Frames.", video=["a b.png", "c.jpg"]),
    conversation("<document>What?", "A paper.", document="paper.pdf"),
    conversation("<image><image>What?", "Two.", image=["c.jpg", "sub/../a b.png"]),
]


@pytest.fixture
def media(tmp_path):
    """A folder of media."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    make_image(folder / "a b.png", (60, 40))
    make_image(folder / "c.jpg", (60, 40), 1)
    make_video(folder / "sub" / "clip.mp4", 12)
    make_pdf(folder / "paper.pdf", 2)
    return folder


@pytest.fixture
def bucket(s3, media):
    """The same in a bucket: its client, and the proxy before it."""
    client, proxy = s3
    for path in media.rglob("*.*"):
        client.put_object(Bucket="media", Key=f"set/{path.relative_to(media)}", Body=path.read_bytes())
    return client, proxy


def remote(folder: Path, *hosts: str) -> RemoteSettings:
    return RemoteSettings(hosts or ("s3://media",), str(folder / "cache"), attempts=2, timeout_s=5.0)


def settings(tokenizer: Path, allowed: RemoteSettings) -> PreprocessSettings:
    return PreprocessSettings(str(tokenizer), (256,), SamplingSettings(tile_size=28), remote=allowed)


def make(
    folder: Path, tokenizer: Path, root: str, allowed: RemoteSettings, records=RECORDS, **how
) -> SampleStore:
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "data.jsonl", records)
    (folder / "recipe.json").write_text(json.dumps({"set": {"annotation": "data.jsonl", "root": root}}))
    preprocess(folder / "recipe.json", folder / "store", settings(tokenizer, allowed), Execution(1, **how))
    return SampleStore(folder / "store")


def pixels(store: SampleStore, allowed: RemoteSettings = RemoteSettings(), **how) -> list[torch.Tensor]:  # noqa: B008
    """Every tile of one epoch in the loader's order."""
    write_packs(store.path, store.length, seed=0)
    config = DataConfig(str(store.path), store.length, remote=allowed, **how)
    loader = PackLoader(
        config, global_batch_size=1, data_parallel_rank=0, data_parallel_size=1, plan=every_tile
    )
    found = []
    try:
        for step in range(loader.packs_per_epoch):
            batch = loader.step(step)
            assert not batch.failures, batch.failures
            found += [pack.pixel_values for pack in batch.microbatches]
    finally:
        loader.close()
    return found


def dropped(store: SampleStore) -> list[str]:
    lines = (store.path / "dropped.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


def test_a_set_in_a_bucket_is_the_set_of_files(bucket, media, tmp_path, tokenizer_dir):
    """All kinds of media: rows, grids, frames and pixels; then cached, and without a server."""
    client, proxy = bucket
    local = make(tmp_path / "files", tokenizer_dir, str(media), RemoteSettings())
    allowed = remote(tmp_path)
    there = make(tmp_path / "bucket", tokenizer_dir, "s3://media/set", allowed)
    assert not dropped(there) and len(there) == len(RECORDS)
    for ours, theirs in zip(there, local, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert [i.path.replace("s3://media/set", str(media)) for i in ours.images] == [
            i.path for i in theirs.images
        ]
        assert [replace(i, path="", mtime_ns=0) for i in ours.images] == [
            replace(i, path="", mtime_ns=0) for i in theirs.images
        ]
        assert [replace(v, path="", mtime_ns=0) for v in ours.videos] == [
            replace(v, path="", mtime_ns=0) for v in theirs.videos
        ]
    expected = pixels(local)
    for cache in (allowed, remote(tmp_path / "node2")):
        found = pixels(there, cache)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert pixels(there, remote(tmp_path / "node3"), decode_threads=1, prefetch=False)
    # Frames that are given one by one are asked for, as their identities are not kept; nothing else is.
    asked = len(proxy.requests)
    pixels(there, allowed)
    again = proxy.requests[asked:]
    assert again and all(request.split("/set/")[1] in ("a%20b.png", "c.jpg") for request in again)
    page = sample_page(there, 0, MediaAccess(allowed))
    assert "s3://media/set/a b.png" in page and "data:image" in page and "cache" not in page
    assert "remote media are off" in sample_page(there, 0)


def test_a_finished_store_is_kept_while_its_objects_are(bucket, tmp_path, tokenizer_dir, capsys):
    client, proxy = bucket
    how = tmp_path / "bucket", tokenizer_dir, "s3://media/set"
    make(*how, remote(tmp_path))
    capsys.readouterr()
    make(*how, remote(tmp_path / "another"))
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match="remote media are off: s3://media/set/.* does not name s3://media"):
        make(*how, RemoteSettings())
    assert len(SampleStore(tmp_path / "bucket" / "store")) == len(RECORDS), "nor is it replaced"
    client.put_object(Bucket="media", Key="set/paper.pdf", Body=b"%PDF-1.4 cut off")
    store = make(*how, remote(tmp_path))
    assert dropped(store) == ["truncated document: s3://media/set/paper.pdf lacks the mark at its end"]


def test_without_hosts_nothing_is_asked(bucket, tmp_path, tokenizer_dir):
    """Not by preprocessing, lint, training, preview or transcoding; the same with hosts does ask."""
    _, proxy = bucket
    store = make(tmp_path / "off", tokenizer_dir, "s3://media/set", RemoteSettings())
    assert len(store) == 0
    assert all(line.startswith("remote media are off: s3://media/set/") for line in dropped(store))
    recipe = tmp_path / "off" / "recipe.json"
    lint = call_tool("preview_data", "lint", recipe)
    assert lint.returncode == 1 and lint.stdout.count("remote media are off") == len(RECORDS) + 1
    call_tool("preprocess_data", "transcode", recipe, "--output", tmp_path / "small", "--workers", "1")
    assert "remote media are off" in (tmp_path / "small" / "failed.jsonl").read_text()
    assert proxy.connections == 0
    flags = "--remote-host", "s3://media", "--remote-cache", tmp_path / "cache"
    lint = call_tool("preview_data", "lint", recipe, *flags)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert proxy.connections > 0
    shutil.rmtree(tmp_path / "small")
    made = call_tool(
        "preprocess_data",
        "transcode",
        recipe,
        "--output",
        tmp_path / "small",
        "--workers",
        "1",
        *flags,
        "--size",
        "32",
    )
    assert made.stdout.startswith("1 copies, 1 of them new"), made.stdout + made.stderr
    there = make(tmp_path / "on", tokenizer_dir, "s3://media/set", remote(tmp_path))
    before = proxy.connections
    write_packs(there.path, there.length, seed=0)
    loader = PackLoader(
        DataConfig(str(there.path), 256),
        global_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        plan=every_tile,
    )
    failed = [failure.reason for failure in loader.step(0).failures.values()]
    loader.close()
    assert failed and all("remote media are off" in reason for reason in failed)
    assert proxy.connections == before


def test_what_training_cannot_have_is_said(bucket, tmp_path, tokenizer_dir):
    client, _ = bucket
    store = make(tmp_path / "bucket", tokenizer_dir, "s3://media/set", remote(tmp_path), RECORDS[:1])
    decoder = MediaDecoder("exact", tile_size=28, files=MediaAccess(remote(tmp_path / "node2")))
    plan = store[0].images[0]
    client.put_object(Bucket="media", Key="set/a b.png", Body=b"x" * plan.file_size)
    with pytest.raises(
        Exception, match="media changed since preprocessing: s3://media/set/a b.png has another ETag"
    ):
        decoder.picture(plan.path, (1, 1), max_pixels=10**6, file=plan.file)


def test_objects_that_fail_are_ledger_lines(bucket, tmp_path, tokenizer_dir):
    """And are had by --retry-failed when the server is well again."""
    _, proxy = bucket
    records = [conversation("<image>What?", "A.", image=name) for name in ("a b.png", "none.png", "c.jpg")]
    proxy.faults.extend(["503", "503"])
    how = tmp_path / "bucket", tokenizer_dir, "s3://media/set", remote(tmp_path), records
    store = make(*how)
    assert dropped(store) == [
        "unreachable media: s3://media/set/a b.png: HTTP 503, 2 times",
        "missing media: s3://media/set/none.png (404)",
    ]
    store = make(*how, retry_failed=True)
    assert dropped(store) == ["missing media: s3://media/set/none.png (404)"]


def test_a_full_disk_ends_the_run_in_a_line(bucket, tmp_path, tokenizer_dir):
    """Not in a ledger of all samples; the same command goes on."""
    how = tmp_path / "bucket", tokenizer_dir, "s3://media/set"
    (tmp_path / "bucket").mkdir()
    allowed = remote(tmp_path)
    MediaAccess(allowed)
    with full_disk(1500), pytest.raises(UserError, match="the cache .*cache: File too large; make room"):
        make(*how, allowed)
    assert len(make(*how, allowed)) == len(RECORDS)


def test_addresses_of_their_own_and_bad_ones(bucket, tmp_path, tokenizer_dir):
    """A record may name an address itself; roots and annotations that cannot be are one line."""
    records = [
        conversation("<image>What?", "A.", image="s3://media/set/c.jpg"),
        conversation("<image>What?", "A.", image="http://host/c.jpg"),
        conversation("<image>What?", "A.", image="https://me:secret@host/c.jpg"),
        conversation("<image>What?", "A.", image="../../c.jpg"),
        conversation("<image>What?", "A.", image="s3://media"),
        conversation("<image>What?", "A.", image={"path": "c.jpg", "image": "https://host/c.jpg?sig=secret"}),
        conversation("<image>What?", "A.", image={"url": "ftp://me:secret@host/c.jpg"}),
    ]
    store = make(tmp_path / "bucket", tokenizer_dir, "s3://media/set", remote(tmp_path), records)
    assert len(store) == 1
    lines = dropped(store)
    assert lines[0] == (
        "unsupported media: http://host/c.jpg is no local file; "
        "remote media are read from https://, not plain http://"
    )
    assert lines[1].startswith("bad media reference: an address of host with a name or password")
    assert "secret" not in "".join(
        path.read_text(errors="ignore") for path in (tmp_path / "bucket" / "store").rglob("*.*")
    )
    assert lines[2:] == [
        "bad media reference: '../../c.jpg' is no file below s3://media/set",
        "bad media reference: 's3://media' names no file",
        "bad media reference: 'https://host/c.jpg?... and 'c.jpg' for one medium",
        "unsupported media: ftp://...@host/c.jpg is no local file",
    ]
    recipe = tmp_path / "recipe.json"
    for entry, line in (
        ({"annotation": "s3://media/data.jsonl"}, "no file of this machine; download annotations"),
        ({"annotation": "https://me:pw@host/data.jsonl"}, ": https://...@host/data.jsonl is no file"),
        ({"annotation": "bucket/data.jsonl", "root": "s3://"}, "root: 's3://' names no bucket"),
    ):
        recipe.write_text(json.dumps({"set": entry}))
        ran = call_tool("preview_data", "lint", recipe)
        assert ran.returncode == 2 and line in ran.stderr, ran.stderr


def test_flags_that_cannot_be(tmp_path):
    recipe = write_jsonl(tmp_path / "data.jsonl", RECORDS)
    for flags, line in (
        (["--remote-host", "s3://media"], "--remote-cache is not set: name a folder"),
        (["--remote-host", "media", "--remote-cache", "c"], "--remote-host 'media' is no address of s3://"),
        (["--remote-cache-bytes", "5"], "--remote-cache-bytes is 5: must lie between"),
        (["--remote-attempts", "0"], "--remote-attempts is 0"),
    ):
        ran = call_tool("preview_data", "lint", recipe, *flags)
        assert ran.returncode == 2 and ran.stderr.startswith(f"error: {line}"), ran.stderr
        assert ran.stderr.count("\n") == 1
    assert not os.path.exists("c")

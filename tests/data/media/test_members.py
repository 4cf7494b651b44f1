"""Members of archives, read where they lie: the same as their files, in every decoder; or one line."""

import io
import multiprocessing
import os
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eagle.data.media.addresses import members
from megatron_eagle.data.media.documents import check_pages, draw_page, page_sizes
from megatron_eagle.data.media.frame_index import demux, read_frame_table
from megatron_eagle.data.media.images import image_size, load_image
from megatron_eagle.data.media.mp4_index import read_mp4
from megatron_eagle.data.media.remux import sparse_remux
from megatron_eagle.data.media.source import (
    MemberRef,
    PageRef,
    check_unchanged,
    file_metadata,
    fingerprint,
    member_ref,
    open_bytes,
)
from megatron_eagle.data.media.transcode import TranscodeSettings, transcode_video
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.problems import Problem
from tests.data.helpers import frame_number, make_image, make_pdf, make_video

PICTURES = ("a.png", "b.jpg", "c.webp", "d.tiff", "e.bmp")
VIDEOS = ("f.mp4", "g.mkv", "h.ts", "i.avi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media as files, in FOLDER/plain, and in FOLDER/media.tar and FOLDER/media.zip."""
    folder = tmp_path_factory.mktemp("members")
    plain = folder / "plain"
    plain.mkdir()
    for seed, name in enumerate(PICTURES):
        make_image(plain / name, (61, 43), seed)
    for name in VIDEOS:
        make_video(plain / name, 30, gop=7, options={"bf": "0"} if name == "i.avi" else None)
    make_pdf(plain / "paper.pdf", 3)
    make_image(plain / "large.bmp", (900, 600))
    assert (plain / "large.bmp").stat().st_size > members._WHOLE
    with tarfile.open(folder / "media.tar", "w") as tar, zipfile.ZipFile(folder / "media.zip", "w") as zipped:
        for path in sorted(plain.iterdir()):
            tar.add(path, path.name)
            zipped.write(path, path.name)
    return folder


def tar_members(file: Path) -> dict[str, str]:
    with tarfile.open(file) as tar:
        return {m.name: str(MemberRef("tar", str(file), m.offset_data, m.size)) for m in tar}


def zip_members(file: Path) -> dict[str, str]:
    found = {}
    data = file.read_bytes()
    with zipfile.ZipFile(file) as zipped:
        for m in zipped.infolist():
            lengths = data[m.header_offset + 26 : m.header_offset + 30]
            start = m.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            found[m.filename] = str(MemberRef("zip", str(file), start, m.file_size))
    return found


@pytest.fixture(params=["tar", "zip"])
def both(request, folder):
    """Pairs of a file and its member, by name."""
    found = {"tar": tar_members, "zip": zip_members}[request.param](folder / f"media.{request.param}")
    return {name: (str(folder / "plain" / name), path) for name, path in found.items()}


def test_names():
    member = MemberRef("tar", "/a b/?offset=1&size=2/ü.tar", 512, 7)
    assert str(member) == "tar:///a b/?offset=1&size=2/ü.tar?offset=512&size=7"
    assert member_ref(str(member)) == member
    assert member_ref("/a.tar?offset=512&size=7") is None
    packed = MemberRef("unzip", "/a.zip", 0, 7, 5)
    assert str(packed) == "unzip:///a.zip?offset=0&size=7&crc=00000005" and member_ref(str(packed)) == packed
    assert member_ref("unzip:///a.zip?offset=0&size=7") is member_ref(f"tar{str(packed)[5:]}") is None
    assert member_ref(f"zip{str(packed)[5:]}") == MemberRef("zip", "/a.zip", 0, 7, 5)
    page = PageRef(str(member), 2, 28, 56)
    assert str(page).startswith("pdf://tar:///a b/")


def test_bytes_and_identity(both):
    for file, member in both.values():
        data = Path(file).read_bytes()
        with open_bytes(member) as opened:
            assert opened.read() == data
            assert opened.seek(-5, os.SEEK_END) == len(data) - 5
            assert opened.read(99) == data[-5:] and opened.read(1) == b""
            opened.seek(10)
            opened.seek(3, os.SEEK_CUR)
            assert (opened.read(4), opened.tell()) == (data[13:17], 17)
            opened.seek(len(data) + 9)
            assert opened.read() == b""
        assert fingerprint(member) == fingerprint(file)
        assert file_metadata(member).size == len(data)
        check_unchanged(member, replace(file_metadata(member), mtime_ns=1), fingerprint(file))
    with pytest.raises(Problem, match="has other content"):
        check_unchanged(member, replace(file_metadata(member), mtime_ns=1), fingerprint(both["a.png"][0]))


def test_pictures_and_pages(both):
    for name in (*PICTURES, "large.bmp"):
        file, member = both[name]
        assert image_size(member, max_pixels=10**7, strict_jpeg=True) == Image.open(file).size
        assert np.array_equal(load_image(member), load_image(file))
    file, member = both["paper.pdf"]
    assert page_sizes(member) == page_sizes(file)
    check_pages(member, [0, 2], max_pixels=10**7)
    with pytest.raises(Problem, match="no page 10"):
        check_pages(member, [9], max_pixels=10**7)
    drawn = [np.asarray(draw_page(PageRef(path, 2, 56, 84), max_pixels=10**7)) for path in (file, member)]
    assert np.array_equal(*drawn)
    assert np.array_equal(load_image(str(PageRef(member, 2, 56, 84))), drawn[0])


def test_videos(both, tmp_path):
    for name in VIDEOS:
        file, member = both[name]
        known, table = read_frame_table(file), read_frame_table(member)
        assert table.file.path == member and table.fingerprint == known.fingerprint
        assert (table.linear_reason, table.time_base) == (known.linear_reason, known.time_base)
        assert np.array_equal(table.pts, known.pts) and np.array_equal(table.keyframes, known.keyframes)
        assert np.array_equal(demux(member).pts, demux(file).pts)
        numbers = [0, 11, 29, 4]
        tiles, times = decode_frames(member, table.index, numbers, size=28, backend="exact")
        expected = decode_frames(file, known.index, numbers, size=28, backend="exact")
        assert torch.equal(tiles, expected[0]) and torch.equal(times, expected[1])
    file, member = both["f.mp4"]
    index = [read_frame_table(path).index.select([3, 20]) for path in (file, member)]
    copies = [sparse_remux(*pair) for pair in zip((file, member), index, strict=True)]
    assert copies[0] == copies[1]
    assert read_mp4(member, file_metadata(member).size) is not None
    copy = str(tmp_path / "copy.mp4")
    assert transcode_video(member, Path(copy), TranscodeSettings(64, 4)) == 30
    tiles, _ = decode_frames(copy, read_frame_table(copy).index, range(30), size=64)
    assert [frame_number(tile.permute(1, 2, 0).numpy()) for tile in tiles] == list(range(30))


def test_dali(both):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    (file, member), index = both["g.mkv"], {}
    for path in (file, member):
        index[path] = decode_frames(path, read_frame_table(path).index, [5, 17], size=28, backend="dali")[0]
    assert torch.equal(index[file], index[member])


def _read(path: str) -> bytes:
    with open_bytes(path) as file:
        return file.read()


def test_threads_and_forks(both, monkeypatch):
    """Each reader has its own place, whoever shares the open archive."""
    expected = {member: Path(file).read_bytes() for file, member in both.values()}
    monkeypatch.setattr(members, "_WHOLE", 0)  # all are read in pieces
    paths = [*expected] * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_read, paths)) == [expected[path] for path in paths]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, paths) == [expected[path] for path in paths]


def test_open_archives_are_few(tmp_path):
    """And one that is being read stays open, whatever else is opened meanwhile."""
    paths = []
    for k in range(members._OPEN_ARCHIVES + 40):
        file = tmp_path / f"{k}.tar"
        with tarfile.open(file, "w") as tar:
            content = tarfile.TarInfo("a")
            content.size = 3 << 19
            tar.addfile(content, io.BytesIO(bytes([k]) * content.size))
        paths.append(tar_members(file)["a"])
    with open_bytes(paths[0]) as first:
        assert first.read(2) == b"\0\0"
        before = len(os.listdir("/proc/self/fd"))
        for k, path in enumerate(paths):
            assert _read(path)[-1] == k
        assert len(os.listdir("/proc/self/fd")) <= before + members._OPEN_ARCHIVES
        first.seek(-1, os.SEEK_END)
        assert first.read() == b"\0"


def test_archives_that_were_changed(folder, tmp_path):
    file = tmp_path / "a.tar"
    data = (folder / "media.tar").read_bytes()
    file.write_bytes(data)
    known = tar_members(file)
    assert load_image(known["b.jpg"]).size == (61, 43)
    with pytest.raises(Problem, match="missing media: .*/b.tar"):
        file_metadata(known["a.png"].replace("a.tar", "b.tar"))
    one = tmp_path / "new"
    with tarfile.open(one, "w") as tar:
        tar.add(folder / "plain" / "large.bmp", "large.bmp")
        tar.add(folder / "plain" / "b.jpg", "b.jpg")
    one.replace(file)  # another file of that name
    with pytest.raises(Problem, match=r"media changed since preprocessing: .*b\.jpg|no such member begins"):
        load_image(known["b.jpg"])
    assert load_image(tar_members(file)["b.jpg"]).size == (61, 43)
    file.write_bytes(data[:9000])  # in its place
    with pytest.raises(Problem, match="the archive at 9000"):
        load_image(known["large.bmp"])
    for path in ("tar://x", "zip:///a?offset=1", f"tar://{file}?offset=512&size=-1"):
        with pytest.raises(Problem, match="no place in an archive"):
            load_image(path)
    with pytest.raises(Problem, match="empty file"):
        load_image(f"tar://{file}?offset=512&size=0")

"""Names of media in archives: found, or one line; and what an archive may not do to whoever reads it."""

import gzip
import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.annotations.mixture import read_recipe
from megatron_eagle.data.annotations.references import References
from megatron_eagle.data.annotations.roots import archives_of, archives_root, open_root, prepared_root
from megatron_eagle.data.media import archive_scan
from megatron_eagle.data.media.addresses import members
from megatron_eagle.data.media.archive_index import index_archive
from megatron_eagle.data.media.archive_scan import plain_name
from megatron_eagle.data.media.source import file_metadata, fingerprint, open_bytes
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

FILES = {
    "a.png": b"A" * 700,
    "b/a.png": b"BA",
    "b/c d.jpg": b"C" * 512,
    "b/clip/10.jpg": b"10",
    "b/clip/9.jpg": b"9",
}
LONG = "/".join(["a folder with a long name"] * 12) + "/ünicode.png"


def make_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def make_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


MAKE = {"tar": make_tar, "zip": make_zip}


def content(path: str) -> bytes:
    with open_bytes(path) as file:
        return file.read()


def read(root: str, name: str) -> bytes:
    return content(open_root(root).path(name))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("kept", [True, False])
def test_names_are_found(tmp_path, kind, kept):
    files = {**FILES, LONG: b"long"}
    archive = MAKE[kind](tmp_path / f"a.{kind}", files)
    cache = tmp_path / "cache" if kept else None
    root = prepared_root(str(archive), cache)
    assert {name: read(root, name) for name in files} == files
    assert read(root, "./b//a.png") == b"BA"
    inner = prepared_root(f"{archive}/b", cache)
    assert read(inner, "a.png") == b"BA"
    assert [read(root, "a.png") for _ in range(2)] == [FILES["a.png"]] * 2
    assert open_root(root).exists("a.png") and not open_root(root).exists("b")
    frames = open_root(inner).pictures("clip")
    assert [content(frame) for frame in frames] == [b"9", b"10"]
    assert open_root(inner).pictures("a.png") == ()
    assert open_root(root).path("/a/../b.png") == "/b.png"
    assert open_root(root).pictures("/no folder") == () and not open_root(root).exists("/a.png")
    for name in ("c.png", "b/../a.png", "b"):
        with pytest.raises(Problem, match="missing media: .* has no member"):
            open_root(root).path(name)
    assert len(list((tmp_path / "cache").iterdir())) == 1 if kept else not (tmp_path / "cache").exists()


def test_odd_names_of_archives(tmp_path):
    """Also one that is no text in UTF-8."""
    for name in ("a=b&c?d#e%20.zip", "\udcff.zip"):
        archive = make_zip(tmp_path / name, {"a.png": b"A"})
        assert read(prepared_root(str(archive), tmp_path / "cache"), "a.png") == b"A"
        assert archives_of(archives_root([str(archive)])) == [str(archive)]


def test_names_that_windows_has_packed(tmp_path):
    """Backslashes stand for folders where an archive's name has no other mark of one."""
    files = {"images\\a.png": b"A", "images\\": b"", "b/c\\d.png": b"CD"}
    root = prepared_root(str(make_zip(tmp_path / "a.zip", files)))
    assert read(root, "images/a.png") == b"A" and read(root, "b/c\\d.png") == b"CD"
    assert read(prepared_root(str(make_tar(tmp_path / "a.tar", files))), "images\\a.png") == b"A"
    assert [open_root(root).exists(name) for name in ("images", "images/", "b/c/d.png")] == [False] * 3


@pytest.mark.parametrize("size", [3000, members._CHECKED + 1])
def test_a_stored_member_is_held_against_its_checksum(tmp_path, size):
    """A large one when it is probed alone."""
    archive = make_zip(tmp_path / "a.zip", {"a.png": bytes(size), "b.png": b"B"})
    root = open_root(prepared_root(str(archive)))
    address = root.path("a.png")
    assert fingerprint(address) and len(content(address)) == size
    with archive.open("r+b") as file:
        file.seek(size - 100)
        file.write(b"x")
    for look in (fingerprint, content)[: 1 if size > members._CHECKED else 2]:
        with pytest.raises(Problem, match="broken archive: .*do not have the checksum"):
            look(address)
    assert content(root.path("b.png")) == b"B"
    without = address.partition("&crc=")[0]  # as older stores have it
    assert content(without)[size - 140 :].count(b"x") == 1


def test_the_folder_around_everything_is_hinted_at(tmp_path):
    root = prepared_root(str(make_zip(tmp_path / "a.zip", {"images/x/1.png": b"1"})))
    with pytest.raises(Problem, match=r"no member x/1.png; name the folder too, root: .*/a.zip/images"):
        open_root(root).path("x/1.png")


def test_several_archives(tmp_path):
    make_zip(tmp_path / "1.zip", {"a.png": b"1", "b.png": b"b"})
    make_tar(tmp_path / "2.tar", {"a.png": b"2", "c.png": b"c"})
    archives = [str(tmp_path / name) for name in ("1.zip", "2.tar")]
    root = prepared_root(archives_root(archives), tmp_path / "cache")
    assert (read(root, "b.png"), read(root, "c.png")) == (b"b", b"c")
    with pytest.raises(Problem, match="a.png is in .*/1.zip and in .*/2.tar"):
        read(root, "a.png")
    (tmp_path / "d.jsonl").write_text("{}\n")
    for value in ("[1.zip, 2.tar]", "'*.[zt]*'"):
        (tmp_path / "recipe.yaml").write_text(f"d: {{annotation: d.jsonl, root: {value}}}")
        assert archives_of(read_recipe(tmp_path / "recipe.yaml")[0].root) == archives
    for value in ("[1, 2]", "'*.rar'"):
        (tmp_path / "recipe.yaml").write_text(f"d: {{annotation: d.jsonl, root: {value}}}")
        with pytest.raises(UserError, match="root"):
            read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kind", MAKE)
def test_an_index_is_made_once(tmp_path, kind, monkeypatch):
    archive = MAKE[kind](tmp_path / "a", FILES)
    index_archive(archive, kind, tmp_path)
    (kept,) = tmp_path.glob("*.arrow")
    before = kept.stat().st_mtime_ns
    assert len(index_archive(archive, kind, tmp_path)) == len(FILES)
    assert kept.stat().st_mtime_ns == before
    MAKE[kind](archive, {"new.png": b"new"})  # another archive of that name
    assert index_archive(archive, kind, tmp_path).find("new.png") == 0
    written = kept.read_bytes()
    for broken in (b"", b"junk", written[:-40], written[:200]):
        kept.write_bytes(broken)
        index = index_archive(archive, kind, tmp_path)
        assert (len(index), index.find("new.png"), index.find("a.png")) == (1, 0, None)
        assert kept.read_bytes() == written
    os.chmod(tmp_path, 0o555)
    try:
        if os.geteuid():  # root writes everywhere
            kept.write_bytes(b"")
            with pytest.raises(UserError, match="cannot write"):
                index_archive(archive, kind, tmp_path)
    finally:
        os.chmod(tmp_path, 0o755)


NAME = st.text("ab /.ü-", min_size=1, max_size=40)
MEMBERS = st.lists(st.tuples(NAME, st.binary(max_size=1100)), max_size=12)


@given(members=MEMBERS, format=st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
@settings(max_examples=60, deadline=None)
def test_the_same_as_tarfile(tmp_path_factory, members, format):
    """Of every name the last content, wherever it lies."""
    path = tmp_path_factory.mktemp("property") / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            add(tar, name, data)
    with tarfile.open(path) as tar:
        expected = {plain_name(m.name): tar.extractfile(m).read() for m in tar if plain_name(m.name)}
    index = index_archive(path, "tar", None)
    assert {index.name(k) for k in range(len(index))} == expected.keys()
    for name, data in expected.items():
        number = index.find(name)
        assert index.size(number) == len(data)
        assert not data or content(index.address(number)) == data
    assert index.find("not there") is None


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_last_of_a_name_counts(tmp_path, format):
    archive = make_tar(tmp_path / "a.tar", {"a.png": b"old", "b.png": b"b"}, format)
    with tarfile.open(archive, "a", format=format) as tar:
        add(tar, "./a.png", b"newer")
    assert read(prepared_root(str(archive)), "a.png") == b"newer"
    index = index_archive(archive, "tar", None)
    assert [index.name(k) for k in range(len(index))] == ["b.png", "a.png"]


def test_what_cannot_be_read_in_place(tmp_path):
    """Links out of the archive, devices, encrypted members, odd compression, and names that lead out."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "real.png", b"real")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="real.png")
        add(tar, "out.png", type=tarfile.LNKTYPE, linkname="/etc/passwd")
        add(tar, "soft.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add(tar, "/etc/absolute.png", b"x")
        add(tar, "../up.png", b"x")
        add(tar, "a/../../up.png", b"x")
    root = prepared_root(str(tmp_path / "a.tar"))
    assert read(root, "hard.png") == b"real"
    for name, reason in (
        ("soft", "a symbolic link"),
        ("out", "a link to /etc/passwd"),
        ("pipe", "no regular file"),
    ):
        with pytest.raises(Problem, match=f"unsupported media: {name}.png in .* is {reason}"):
            read(root, f"{name}.png")
    index = index_archive(tmp_path / "a.tar", "tar", None)
    assert {index.name(k) for k in range(len(index))} == {
        f"{n}.png" for n in ("real", "hard", "soft", "out", "pipe")
    }
    make_zip(tmp_path / "a.zip", {"a.png": b"a" * 100, "../up.png": b"x"}, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("locked.png", b"secret")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rindex(b"PK\1\2")
    data[at + 8] |= 1  # encrypted
    (tmp_path / "a.zip").write_bytes(data)
    root = prepared_root(str(tmp_path / "a.zip"))
    for name, reason in (
        ("a", "compressed by a method"),
        ("link", "a symbolic link"),
        ("locked", "encrypted"),
    ):
        with pytest.raises(Problem, match=f"{name}.png in .* is {reason}"):
            read(root, f"{name}.png")


def sparse_tar(path: Path) -> Path:
    """A member as GNU tar stores a file with a hole: 4 bytes of 1 MiB."""
    header = tarfile.TarInfo("hole.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 4
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 4)
    block[483:495] = b"%011o\0" % (1 << 20)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + b"data".ljust(512, b"\0") + bytes(1024))
    return path


def test_sparse_members(tmp_path):
    with pytest.raises(Problem, match="hole.png in .* is stored as a sparse file"):
        read(prepared_root(str(sparse_tar(tmp_path / "a.tar"))), "hole.png")


def test_damaged_archives_are_one_line(tmp_path):
    make_tar(tmp_path / "whole.tar", FILES)
    data = (tmp_path / "whole.tar").read_bytes()
    second = 512 + 1024
    broken = {
        "cut in a member": (data[: second + 600], "damaged or cut off"),
        "cut in a header": (data[: second + 100], "damaged or cut off at byte 1536"),
        "cut between members": (data[:second], "no end mark at byte 1536.*head -c 1024"),
        "a header is damaged": (data[:second] + b"x" + data[second + 1 :], "damaged or cut off at byte 1536"),
        "two archives": (data + data, "more behind its end mark"),
        "empty": (b"", "damaged or cut off"),
    }
    for name, (content, match) in broken.items():
        file = tmp_path / f"{name}.tar"
        file.write_bytes(content)
        with pytest.raises(UserError, match=match) as refused:
            prepared_root(str(file))
        assert "\n" not in str(refused.value) and str(file) in str(refused.value), name
    make_zip(tmp_path / "whole.zip", FILES)
    data = (tmp_path / "whole.zip").read_bytes()
    for name, content in (("cut", data[:-30]), ("start", data[:200])):
        (tmp_path / f"{name}.zip").write_bytes(content)
        with pytest.raises(UserError, match="damaged or cut off"):
            prepared_root(str(tmp_path / f"{name}.zip"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="neither a folder nor a tar or zip archive"):
        prepared_root(str(tmp_path / "a.txt"))
    pointer = tmp_path / "pointer.tar"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="a pointer of git-lfs, not the file itself; run git lfs pull$"):
        prepared_root(str(pointer))
    with pytest.raises(UserError, match="the archive .*/none.tar.gz does not exist"):
        prepared_root(str(tmp_path / "none.tar.gz"))
    with pytest.raises(UserError, match="cannot read .*/none.zip"):
        prepared_root(archives_root([str(tmp_path / "none.zip")]))
    assert prepared_root(str(tmp_path)) == str(tmp_path)
    assert prepared_root(str(tmp_path / "not" / "there")) == str(tmp_path / "not" / "there")


@pytest.mark.parametrize(
    ("name", "joined"),
    [
        ("x.tar.gz.part_aa", "cat {}/x.tar.gz.part_* > {}/x.tar.gz"),
        ("x.tar.ab", "cat {}/x.tar.* > {}/x.tar"),
        ("x.zip.001", "cat {}/x.zip.* > {}/x.zip"),
        ("x.tar.gz", ""),
        ("x.tar.xz", ""),
    ],
)
def test_pieces_of_an_archive(tmp_path, name, joined):
    """Of one that was cut for its upload, the first piece looks like an archive that was cut off."""
    (tmp_path / name).write_bytes(gzip.compress(bytes(10240))[:30])
    with pytest.raises(UserError) as raised:
        prepared_root(str(tmp_path / name), tmp_path / "cache")
    said = str(raised.value)
    assert ("if it is a piece of an archive" in said) == bool(joined)
    assert said.endswith(joined.format(tmp_path, tmp_path))


def test_a_zip_that_changed(tmp_path):
    archive = make_zip(tmp_path / "a.zip", FILES)
    root = prepared_root(str(archive), tmp_path / "cache")
    status = archive.stat()
    archive.write_bytes(bytes(status.st_size))
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(Problem, match="media changed since preprocessing: .*a.zip: no member begins at byte"):
        open_root(root).path("b/a.png")


def test_compressed_members(tmp_path, monkeypatch):
    """Unpacked in memory as they are read, and held against their checksum; a bomb ends at its own size."""
    files = {"a.png": b"A" * 3_000_000, "b.png": os.urandom(3000), "empty.png": b""}
    archive = make_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)
    root = prepared_root(str(archive), tmp_path)
    addresses = {name: open_root(root).path(name) for name in files}
    assert addresses["a.png"].startswith(f"unzip://{archive}?offset=0&size=3000000&crc=")
    assert all(content(addresses[name]) == files[name] for name in ("a.png", "b.png"))
    assert file_metadata(addresses["a.png"]).size == 3_000_000
    (tmp_path / "b.png").write_bytes(files["b.png"])
    assert fingerprint(addresses["b.png"]) == fingerprint(str(tmp_path / "b.png"))
    for change in ("size=3000000", "crc=" + addresses["a.png"][-8:]):
        other = addresses["a.png"].replace(change, change[:-1] + ("1" if change[-1] != "1" else "2"))
        with pytest.raises(Problem, match="broken archive: .* what comes out is not what it says"):
            content(other)
    data = bytearray(archive.read_bytes())
    data[data.index(b"b.png") + 500] ^= 8
    archive.write_bytes(data)
    with pytest.raises(Problem, match="broken archive"):
        content(addresses["b.png"])
    archive.write_bytes(bytes(len(data)))
    with pytest.raises(Problem, match="media changed since preprocessing"):
        content(addresses["a.png"])
    monkeypatch.setattr(archive_scan, "_MAX_UNPACKED", 100_000)
    root = prepared_root(str(make_zip(tmp_path / "b.zip", files, zipfile.ZIP_DEFLATED)))
    with pytest.raises(Problem, match="a.png in .* is compressed, with more than 100,000 bytes; unpack it"):
        read(root, "a.png")


def test_large_members_and_old_headers(tmp_path):
    """A size of 8 GiB and more is kept in another way; before 1988 headers had no mark."""
    old = bytearray(make_tar(tmp_path / "a.tar", {"a.png": b"old"}, tarfile.USTAR_FORMAT).read_bytes())
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old[:512])
    (tmp_path / "a.tar").write_bytes(old)
    assert read(prepared_root(str(tmp_path / "a.tar")), "a.png") == b"old"
    size = (1 << 33) + 3
    for name, format in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        member = tarfile.TarInfo("large.mp4")
        member.size = size
        header = member.tobuf(format)
        path = tmp_path / f"{name}.tar"
        with path.open("wb") as file:  # with a hole
            file.write(header)
            file.seek(len(header) + size - 4)
            file.write(b"last")
            file.seek(-size % 512, os.SEEK_CUR)
            file.write(bytes(1024))
        with open_bytes(open_root(prepared_root(str(path))).path("large.mp4")) as opened:
            assert opened.seek(-4, os.SEEK_END) == size - 4
            assert opened.read() == b"last"


def test_references(tmp_path):
    """As a record names them: a picture, a video, frames in a folder of the archive, a document."""
    archive = make_tar(tmp_path / "a.tar", {**FILES, "d.pdf": b"%PDF-1.4"})
    references = References(prepared_root(str(archive)))
    assert references.image("b/a.png").startswith(f"tar://{archive}?offset=")
    assert references.document("d.pdf").startswith("tar://")
    assert references.document(references.path("d.pdf")) == references.path("d.pdf")
    assert references.document(["a.png"]) == (references.image("a.png"),)
    video = references.video("b/clip", {})
    assert len(video.frames.pictures) == 2
    assert references.video("a.png", {}).frames is None
    with pytest.raises(Problem, match="b/none"):
        references.video("b/none", {})
    with pytest.raises(Problem, match="folder without pictures"):
        References(prepared_root(str(make_zip(tmp_path / "b.zip", {"x/y.txt": b"1"})))).video("x", {})
    with pytest.raises(Problem, match="no local file"):
        references.image("tar://x")
    assert replace(video, path="") == replace(
        references.video(["b/clip/9.jpg", "b/clip/10.jpg"], {}), path=""
    )

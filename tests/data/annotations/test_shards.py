"""Records of tar archives as WebDataset and Energon have them: what webdataset itself reads of them."""

import io
import json
import sqlite3
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from megatron_eagle.data.annotations.energon import energon_folder, expanded
from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.shards import TarRecords, _grouped
from megatron_eagle.data.media import archive_index
from megatron_eagle.data.media.archive_index import index_archive
from megatron_eagle.data.media.archive_scan import scan
from megatron_eagle.data.media.source import open_bytes
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.helpers import conversation

PNG, MP4 = b"png bytes", b"mp4 bytes"


def write(path: Path, members: Iterable[tuple[str, object]]) -> Path:
    """A tar archive; what is not bytes is written as JSON or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else to_bytes(content)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def to_bytes(content: object) -> bytes:
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def content(address: str) -> bytes:
    with open_bytes(address) as file:
        return file.read()


def records(path: Path, cache: Path | None = None) -> list[dict | Problem]:
    """All records; addresses of media are replaced by the bytes there."""

    def loaded(value: object) -> object:
        if isinstance(value, str) and value.startswith("tar://"):
            return content(value)
        if isinstance(value, dict):
            return {key: loaded(inner) for key, inner in value.items()}
        return [loaded(inner) for inner in value] if isinstance(value, list) else value

    source, found = TarRecords(path, cache), []
    for number in range(len(source)):
        try:
            found.append(loaded(json.loads(source.read(number))))
        except Problem as problem:
            found.append(problem)
    source.close()
    return found


def one(path: Path, **parts: object) -> dict:
    """The record of one base name with these parts; `__` in a name stands for a dot."""
    (found,) = records(write(path, [(f"x.{name.replace('__', '.')}", part) for name, part in parts.items()]))
    if isinstance(found, Problem):
        raise found
    return found


def test_the_same_as_webdataset(tmp_path):
    """Every record and every byte, also of a shard that webdataset's own writer made."""
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for k in range(20):
            sample = {"jpg": bytes([k]) * (k * 100 + 1), "json": {"caption": f"é{k}", "width": k}, "cls": k}
            writer.write({"__key__": f"set/{k:05d}", **sample})
    peer = list(wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False))
    own = records(tmp_path / "a.tar")
    assert len(own) == len(peer) == 20
    for mine, theirs in zip(own, peer, strict=True):
        assert mine["images"] == [theirs["jpg"]]
        assert mine["caption"] == json.loads(theirs["json"])["caption"]
        assert mine["cls"].startswith("a part of"), "which nothing reads"


def test_base_names_end_at_the_first_dot(tmp_path):
    members = [("a/x.img_0.jpg", b"0"), ("a/x.img_1.jpg", b"1"), ("a/x.json", {"caption": "A."})]
    members += [
        ("b/x.jpg", b"b"),
        ("b/x.txt", "B."),
        ("__meta.json", {}),
        ("b/.hidden", b""),
        ("README", b""),
    ]
    members += [("./v1.5/y.jpg", b"y"), ("./v1.5/y.txt", "Y.")]
    found = records(write(tmp_path / "a.tar", members))
    assert found == [
        {"caption": "A.", "images": [b"0", b"1"]},
        {"images": [b"b"], "caption": "B."},
        {"images": [b"y"], "caption": "Y."},
    ]


def test_parts_that_do_not_follow_each_other(tmp_path):
    """As `tar cf a.tar *.jpg *.txt` has them; and where one is there twice, the last one counts."""
    members = [(f"{k}.jpg", b"%d" % k) for k in range(3)] + [(f"{k}.txt", f"{k}.") for k in range(3)]
    members += [("1.txt", "One.")]
    found = records(write(tmp_path / "a.tar", members))
    assert [(record["images"], record["caption"]) for record in found] == [
        ([b"0"], "0."), ([b"1"], "One."), ([b"2"], "2.")
    ]  # fmt: skip


def test_conversations(tmp_path):
    """In every dialect, as an object or as the bare list of turns."""
    turns = conversation("<image>Q?", "A.")["conversations"]
    for value in ({"conversations": turns}, turns, {"conversations": turns, "image": "x.jpg"}):
        record = one(tmp_path / "a.tar", jpg=PNG, json=value)
        assert record["conversations"] == turns
        assert (record.get("images") or [record["image"]]) == [PNG]
    assert one(tmp_path / "a.tar", jpg=PNG, json=b"\xef\xbb\xbf" + to_bytes(turns))["conversations"] == turns
    assert one(tmp_path / "a.tar", jpg=PNG, json={"texts": turns})["messages"] == turns
    messages = [{"role": "user", "content": "<image>Q?"}, {"role": "assistant", "content": "A."}]
    texts = [{"user": "Q?", "assistant": "A."}]
    for value in ({"messages": messages}, {"texts": texts}, {"question": "Q?", "answer": "A."}):
        path = write(tmp_path / "b.tar", [("x.png", PNG), ("x.json", value), ("y.json", {"texts": texts})])
        raw = [TarRecords(path).read(k) for k in range(2)]
        with_picture, text_only = (read_sample(r, root="/none", file="f", line=1) for r in raw)
        assert content(with_picture.images[0]) == PNG and not text_only.images


def test_media_of_all_kinds(tmp_path):
    path = write(
        tmp_path / "a.tar",
        [("v.mp4", MP4), ("v.json", conversation("<video>Q?", "A.")), ("d.pdf", b"%PDF-1.4")]
        + [("d.json", conversation("<document>Q?", "A."))],
    )
    samples = [read_sample(TarRecords(path).read(k), root="/", file="f", line=1) for k in range(2)]
    assert content(samples[0].videos[0].path) == MP4
    assert content(samples[1].documents[0]) == b"%PDF-1.4"


def test_pictures_in_order(tmp_path):
    """By the numbers in their names, or as the record lists them."""
    parts = {f"img_{k}__jpg": b"%d" % k for k in (10, 9, 0)}
    assert one(tmp_path / "a.tar", **parts, txt="T.")["images"] == [b"0", b"9", b"10"]
    for names in (["img_9.jpg", "img_0.jpg", "img_10.jpg"], ["img_9", "img_0", "img_10"]):
        for key in ("image_keys", "name"):
            record = one(tmp_path / "a.tar", **parts, json={"caption": "T.", key: names})
            assert record == {"caption": "T.", "images": [b"9", b"0", b"10"]}
    named = {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.img_9.jpg"}]}]}
    record = one(tmp_path / "a.tar", **parts, json=named)
    assert record["messages"][0]["content"] == [{"type": "image", "image": b"9"}]
    assert {key for key in record if key.endswith(".jpg")} == {"img_10.jpg", "img_0.jpg"}, "unknown keys"
    with pytest.raises(Problem, match="image_keys names 'img_7'; its parts are img_0.jpg"):
        one(tmp_path / "a.tar", **parts, json={"caption": "T.", "image_keys": ["img_7"]})


def test_names_that_are_no_parts(tmp_path):
    """One other name for one picture is the name that it had; more are a matter of taste, and refused."""
    assert one(tmp_path / "a.tar", jpg=PNG, json={"image": "coco/1.jpg", "caption": "T."})["images"] == [PNG]
    with pytest.raises(Problem, match="the record names coco/1.jpg, coco/2.jpg; its parts are 0.jpg, 1.jpg"):
        one(
            tmp_path / "a.tar",
            **{"0__jpg": b"0", "1__jpg": b"1"},
            json={"image": ["coco/1.jpg", "coco/2.jpg"]},
        )


def test_captions_beside_other_words(tmp_path):
    assert "txt" not in one(tmp_path / "a.tar", jpg=PNG, txt="T.", json={"caption": "T.", "width": 3})
    assert one(tmp_path / "a.tar", jpg=PNG, txt="T.", json={"width": 3})["caption"] == "T."
    other = one(tmp_path / "a.tar", jpg=PNG, txt="T.", json={"caption": "Other."})
    assert other["caption"] == "Other." and "txt" in other, "an unknown key"
    assert "txt" in one(tmp_path / "a.tar", jpg=PNG, txt="T.", json=conversation("<image>Q?", "A."))


def test_what_is_refused(tmp_path):
    refused = {
        "unsupported key": ({"wav": b"RIFF"}, '"audio"'),
        "unknown key": ({"cls": "3"}, '"cls" of a record'),
        "unsafe media": ({"pyd": b"\x80\4."}, "pickle"),
        "broken JSON": ({"json": "{"}, ""),
        "broken text": ({"json": b'{"caption": "\xff"}'}, "UTF-8"),
        "not a record": ({"json": '"text"'}, ""),
        "unknown format": ({}, "a record needs"),
    }
    for kind, (parts, match) in refused.items():
        members = [("x.jpg", PNG), *((f"x.{name}", part) for name, part in parts.items())]
        members += [("x.txt", "T.")] if kind in ("unsupported key", "unknown key", "unsafe media") else []
        path = write(tmp_path / f"{kind}.tar", [*members, ("y.txt", "T.")])
        with pytest.raises(Problem, match=match) as problem:
            read_sample(TarRecords(path).read(0), root="/", file="f", line=1)
        assert problem.value.kind == kind
    with pytest.raises(Problem, match="txt is not UTF-8"):
        one(tmp_path / "a.tar", jpg=PNG, txt=b"\xff")
    with pytest.raises(UserError, match="holds no record"):
        TarRecords(write(tmp_path / "empty.tar", []))
    with pytest.raises(UserError, match="media.tar holds media and no texts; .* it may be their root"):
        TarRecords(write(tmp_path / "media.tar", [("x.jpg", PNG), ("y.mp4", MP4)]))
    write(tmp_path / "link.tar", [("y.txt", "T.")])
    with tarfile.open(tmp_path / "link.tar", "a") as tar:
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(Problem, match="a symbolic link"):
        TarRecords(tmp_path / "link.tar").read(1)


def test_long_texts_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_eagle.data.annotations.shards._MAX_TEXT", 5)
    with pytest.raises(Problem, match="the part txt has 6 bytes of text"):
        one(tmp_path / "a.tar", jpg=PNG, txt="123456")
    assert one(tmp_path / "a.tar", jpg=PNG, txt="12345")["caption"] == "12345"


def test_closed_and_read_again(tmp_path):
    path = write(tmp_path / "a.tar", [(f"{k}.{e}", b"%d" % k) for k in range(9) for e in ("jpg", "txt")])
    source = TarRecords(path, tmp_path / "cache")
    first = source.read(3)
    source.close()
    assert source._index is None and len(source) == 9
    assert source.read(3) == first and json.loads(first)["caption"] == "3"
    other = TarRecords(write(tmp_path / "b.tar", [("x.jpg", b""), ("x.txt", "")]))
    assert source.layout == other.layout != TarRecords(write(tmp_path / "c.tar", [("x.txt", "")])).layout


def test_braces():
    assert expanded("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expanded("{a,b}/{8..10}.tar") == [f"{a}/{k}.tar" for a in "ab" for k in (8, 9, 10)]
    assert expanded("{09..10}") == ["09", "10"] and expanded("x{y}z") == ["x{y}z"] and expanded("a") == ["a"]
    for pattern in ("{0..99999999}", "{000..999}{000..999}{0..9}"):
        with pytest.raises(UserError, match="stands for more than 1,000,000 names"):
            expanded(pattern)
    assert expanded("{2..2}.tar") == ["2.tar"]
    with pytest.raises(UserError, match=r"\{2\.\.1\} stands for no name: it counts down"):
        expanded("a/{2..1}.tar")


def prepared(folder: Path, n: int = 3, dataset: dict | None = None, **split) -> Path:
    """A folder as `energon prepare` leaves it: two archives for training, one for validation."""
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    names = ["shards/s_000.tar", "shards/s_001.tar", "shards/s_002.tar"]
    for number, name in enumerate(names):
        members = [(f"{number}{k}.{e}", f"{number}{k}{e}") for k in range(n) for e in ("jpg", "txt")]
        write(folder / name, members)
    split = {"split_parts": {"train": ["shards/s_{000..001}.tar"], "val": names[2:], "test": []}, **split}
    (meta / "split.yaml").write_text(yaml.safe_dump(split))
    (meta / "dataset.yaml").write_text(yaml.safe_dump(dataset or {"sample_loader": "sample_loader.py:load"}))
    (meta / "sample_loader.py").write_text("raise SystemExit('was run')\n")
    (meta / ".info.yaml").write_text(
        yaml.safe_dump({"shard_counts": dict.fromkeys(names, n)}, sort_keys=False)
    )
    with sqlite3.connect(meta / "index.sqlite") as index:
        index.execute("CREATE TABLE samples (tar_file_id, sample_key, sample_index, byte_offset, byte_size)")
        index.execute(
            "CREATE TABLE sample_parts "
            "(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size)"
        )
        for number, name in enumerate(names):
            with tarfile.open(folder / name) as tar:
                for k, member in enumerate(tar):
                    key, _, part = member.name.partition(".")
                    if k % 2 == 0:
                        index.execute("INSERT INTO samples VALUES (?, ?, ?, 0, 0)", (number, key, k // 2))
                    row = (number, k // 2, part, member.offset_data, member.size)
                    index.execute("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", row)
    index.close()
    return folder


def captions(path: Path) -> list[str]:
    return [record["caption"] for record in records(path)]


def test_energon_splits(tmp_path):
    folder = energon_folder(prepared(tmp_path / "e", exclude=["shards/s_001.tar/11", "shards/s_002.tar"]))
    train = folder.archives("train")
    assert [path.name for path in train] == ["s_000.tar", "s_001.tar"]
    for split in ("val", "test"):
        with pytest.raises(UserError, match=f"the split {split} of .*e has no archive that is not excluded"):
            folder.archives(split)
    assert captions(train[1]) == ["10txt", "12txt"]
    assert TarRecords(train[0]).form == "WebDataset of Energon, its sample_loader is not run"
    with pytest.raises(UserError, match="holds the splits train, val; say which is meant, e.g. split: train"):
        folder.archives(None)
    with pytest.raises(UserError, match="has no split dev; it has train, val"):
        folder.archives("dev")
    train[0].unlink()
    with pytest.raises(UserError, match="s_000.tar is missing, which .*split.yaml names"):
        folder.archives("train")
    assert energon_folder(tmp_path) is None


def test_energon_index(tmp_path, monkeypatch):
    """It spares reading the archive through; where it does not fit the archive, that is done."""
    folder = energon_folder(prepared(tmp_path / "e"))
    archive, scanned = folder.archives("train")[1], []
    monkeypatch.setattr(archive_index, "scan", lambda *given: scanned.append(given) or scan(*given))
    assert captions(archive) == ["10txt", "11txt", "12txt"] and not scanned
    assert folder.members(archive) == scan(archive, "tar")
    changes = {
        "another name": [(f"1{k}.{e}", f"1{k}{e}") for k in (3, 4, 5) for e in ("jpg", "txt")],
        "longer": [(f"1{k}.{e}", f"1{k}{e}") for k in range(4) for e in ("jpg", "txt")],
    }
    for change, members in changes.items():
        write(archive, members)
        scanned.clear()
        assert captions(archive) == [text for name, text in members if name.endswith("txt")], change
        assert len(scanned) == 1
    (tmp_path / "e/.nv-meta/index.sqlite").write_bytes(b"no database")
    assert len(captions(archive)) == 4


@pytest.mark.parametrize("shift", [-1536, 1])
def test_an_energon_index_with_wrong_places(tmp_path, shift):
    """Also between the members whose headers are looked at: a record would have another one's picture."""
    folder = energon_folder(prepared(tmp_path / "e", n=40))
    archive = folder.archives("train")[1]
    whole = folder.members(archive)
    assert whole == scan(archive, "tar")
    wrong = whole[7]
    with sqlite3.connect(tmp_path / "e/.nv-meta/index.sqlite") as index:
        changed = index.execute(
            "UPDATE sample_parts SET content_byte_offset = ? "
            "WHERE content_byte_offset = ? AND tar_file_id = 1",
            (wrong.place + shift, wrong.place),
        )
        assert changed.rowcount == 1
    index.close()
    assert folder.members(archive) is None


def test_energon_fields(tmp_path):
    """`field_map` says what parts become; the others are of no use."""
    sample_type = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
    fields = {"image": "png,jpg", "caption": "txt"}
    folder = prepared(tmp_path / "a", dataset={"sample_type": sample_type, "field_map": fields})
    assert records(folder / "shards/s_000.tar")[1] == {"images": [b"01jpg"], "caption": "01txt"}
    fields = {"image": "jpg", "context": "json[qa][q]", "answers": "json[qa][a]"}
    folder = prepared(tmp_path / "b", dataset={"field_map": fields})
    path = folder / "shards/s_000.tar"
    write(path, [("x.jpg", PNG), ("x.json", {"qa": {"q": "Q?", "a": ["A."]}}), ("y.json", {"qa": 1})])
    found = records(path)
    assert found[0] == {"images": [PNG], "question": "Q?", "answer": "A."}
    assert str(found[1]) == "broken JSON: the part json has no [qa][a]"
    sample = read_sample(json.dumps({**found[0], "images": []}).encode(), root="/", file="f", line=1)
    assert sample.turns[1].parts == ("A.",)
    odd = {"image": "jpg", "caption": "txt", "words_boxes": "json[boxes]"}
    folder = prepared(tmp_path / "c", dataset={"field_map": odd})
    assert TarRecords(folder / "shards/s_000.tar")._fields == ()


@pytest.mark.parametrize(
    "content, match",
    [
        ("split_parts: {train: [/etc/x.tar]}", "names /etc/x.tar, which is not in"),
        ("split_parts: {train: [../x.tar]}", r"names ../x.tar, which is not in"),
        ("split_parts: {train: 3}", "something else than names"),
        ("split_parts: [a]", "has no split_parts"),
        ("- a", "is no mapping"),
        ("{", "cannot read .*split.yaml"),
        ("!!python/object/apply:os.system ['touch /tmp/ran']", "cannot read .*split.yaml"),
    ],
)
def test_broken_energon_folders(tmp_path, content, match):
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta/split.yaml").write_text(content)
    with pytest.raises(UserError, match=match) as error:
        energon_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_records_are_numbers_and_not_objects(tmp_path):
    """An archive may have a million: here 500 of two parts, told together though they lie apart."""
    turns = {"conversations": conversation("Q", "A.")["conversations"]}
    members = [
        (f"{k:05d}.{part}", value) for part, value in (("jpg", PNG), ("json", turns)) for k in range(500)
    ]
    source = TarRecords(write(tmp_path / "a.tar", members))
    assert len(source) == 500 and all(b"tar://" in source.read(k) for k in (0, 250, 499))
    index = index_archive(tmp_path / "a.tar", "tar", None)
    _grouped(index, None)  # what is made once
    tracemalloc.start()
    try:
        numbers = _grouped(index, None)
        assert 8 < tracemalloc.get_traced_memory()[0] / len(members) < 48
        objects = [{f"{k}.jpg": k, f"{k}.json": k} for k in range(500)]
        assert tracemalloc.get_traced_memory()[0] / len(members) > 100, "objects are seen"
    finally:
        tracemalloc.stop()
    assert len(objects) == len(numbers[1]) - 1

"""Annotation files in every form give the same records, by the same numbers."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.data.annotations import records
from megatron_eagle.data.annotations.records import is_annotation, numbered, open_records
from megatron_eagle.errors import UserError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\[]{},: \né', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def write(path, data: bytes):
    """A file, packed as its suffix says."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(data)
    return path


def read(path):
    return [json.loads(raw.decode("utf-8-sig")) for _, raw in numbered(open_records(path))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@settings(max_examples=80, deadline=None)
@given(
    items=st.lists(JSON, max_size=6),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    bom=st.booleans(),
)
def test_any_array_in_any_blocks(folder, items, block, indent, bom):
    start = "\ufeff \n" if bom else ""
    text = start + json.dumps(items, indent=indent, ensure_ascii=False) + "\n"
    path = write(folder / "a.json", text.encode())
    whole, records._BLOCK = records._BLOCK, block
    try:
        assert read(path) == items
    finally:
        records._BLOCK = whole


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["lines", "array", "array behind a BOM"])
def test_forms(tmp_path, form, packing):
    items = [{"text": f"é {k}"} for k in range(5)]
    if form == "lines":
        data = "".join(json.dumps(item) + "\n" for item in items).encode()
    else:
        data = (b"\xef\xbb\xbf" if "BOM" in form else b"") + json.dumps(items, indent=2).encode()
    path = write(tmp_path / f"a.json{packing}", data)
    source = open_records(path)
    kind = {"": "", ".gz": ", gzip", ".zst": ", zstd"}[packing]
    assert source.form == ("JSON lines" if form == "lines" else "JSON array") + kind
    assert len(source) == 5
    assert [json.loads(source.read(k).decode()) for k in (3, 0, 4)] == [items[3], items[0], items[4]]
    source.close()
    assert json.loads(source.read(1)) == items[1]  # opened again
    source.close()
    assert read(path) == items


def test_broken_elements_are_records_of_their_own(tmp_path):
    path = write(tmp_path / "a.json", b'[{"a": 1}, {"b" 2}, , {"c": 3}]')
    found = list(numbered(open_records(path)))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [raw.strip() for _, raw in found] == [b'{"a": 1}', b'{"b" 2}', b"", b'{"c": 3}']


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.json", b'[{"a": 1}, {"b": 2}', "JSON array does not end; element 2, from byte 10"),
        ("a.json", b'[{"a": "1}]', "JSON array does not end; element 1, from byte 1"),
        ("a.json", b"[1] [2]", "more text behind the end of its JSON array, at byte 3"),
        ("a.json", b'{\n "data": []\n}', "is one JSON object; records are lines"),
        ("a.jsonl.gz", None, "cannot read"),
        ("a.jsonl.zst", None, "cannot read"),
        ("none.json", b"", "cannot read"),
    ],
)
def test_files_that_are_none_are_one_line(tmp_path, name, data, reason):
    path = tmp_path / name
    if data is None:
        whole = write(path, b'{"a": 1}\n' * 1000).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif data:
        write(path, data)
    with pytest.raises(UserError, match=reason) as caught:
        open_records(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_large_array_is_not_held(tmp_path):
    """Scanned in blocks, read one element at a time: 40 MB never lie in memory."""
    item = json.dumps({"text": "x" * 4000})
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + item)
        for _ in range(9999):
            file.write(",\n" + item)
        file.write("]")
    tracemalloc.start()
    try:
        source = open_records(path)
        assert len(source) == 10_000 and len(json.loads(source.read(9_999))["text"]) == 4000
        source.close()
        assert tracemalloc.get_traced_memory()[1] < 16e6 < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_what_a_folder_holds(tmp_path):
    names = ["a.json", "b.jsonl.gz", "c.ndjson", ".d.json", "dataset_info.json", "e.txt"]
    names += ["f.parquet", "cache-1.arrow", "state.json"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "g.json").mkdir()
    assert [name for name in names if is_annotation(tmp_path / name)] == [*names[:3], "f.parquet"]
    assert not is_annotation(tmp_path / "g.json")

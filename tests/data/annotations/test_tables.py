"""The rows of parquet and Arrow files as records: the same whatever the order in which they are asked for."""

import io
import json
import os
import time
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_eagle.data.annotations.records import description, open_records
from megatron_eagle.data.media.addresses import rows as rows_module
from megatron_eagle.data.media.source import file_metadata, fingerprint, open_media
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem
from tests.data.published_sets import IMAGE, held, picture, write_parquet


def write_arrow(path, rows, types, kind="stream", batch=3, **options):
    """Rows as an Arrow stream or file."""
    columns = {key: pa.array([row.get(key) for row in rows], types.get(key)) for key in rows[0]}
    table = pa.table(columns)
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema, **options) as out:
        out.write_table(table, max_chunksize=batch)
    return path


WRITERS = {
    "parquet": lambda path, rows, types: write_parquet(path, rows, types, group=7),
    "stream": lambda path, rows, types: write_arrow(path, rows, types, "stream"),
    "file": lambda path, rows, types: write_arrow(path, rows, types, "file"),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def record(source, number):
    return json.loads(source.read(number))


def value(address):
    return open_media(address).read()


def test_any_order(tmp_path, write, monkeypatch):
    """Through batches of few rows, of which few are kept, in an order that goes back and forth."""
    monkeypatch.setattr(rows_module, "_BATCH_BYTES", 400)
    monkeypatch.setattr(rows_module, "_KEPT_BYTES", 700)
    types = {"images": pa.list_(IMAGE), "deep": pa.list_(pa.list_(pa.struct({"image": pa.large_binary()})))}
    rows = [
        {
            "id": k,
            "images": [held(k + i) for i in range(k % 4)],
            "deep": [[], [{"image": picture(k)}, {"image": None}]],
        }
        for k in range(40)
    ]
    path = write(tmp_path / "t", rows, types)
    source = open_records(path)
    assert description(path) == "" and source.in_workers and len(source) == 40
    for number in np.random.default_rng(0).permutation(np.repeat(np.arange(40), 3)).tolist():
        found = record(source, number)
        assert found["id"] == number
        assert [value(address) for address in found["images"]] == [
            picture(number + i) for i in range(number % 4)
        ]
        empty, (first, second) = found["deep"]
        assert (empty, second) == ([], {"image": None}) and value(first["image"]) == picture(number)


def test_media_in_other_lists(tmp_path, write):
    """Lists of one length, as `datasets` stores a sequence with a length. Maps hold no media."""
    rows = [{"images": [held(k), held(k + 1)], "id": k} for k in range(5)]
    source = open_records(write(tmp_path / "t", rows, {"images": pa.list_(IMAGE, 2)}))
    for k in (4, 0, 3):
        assert [value(address) for address in record(source, k)["images"]] == [picture(k), picture(k + 1)]
    path = write_arrow(
        tmp_path / "u", [{"image": [("a", picture(1))]}], {"image": pa.map_(pa.string(), pa.binary())}
    )
    with pytest.raises(Problem, match="unsupported media: .*u holds media as map"):
        open_records(path).read(0)


def test_columns_that_cannot_be_told_apart(tmp_path, write):
    """Of two columns with one name a row would have the last, without a word."""
    path = write(tmp_path / "t", [{"caption": "a", "captiom": "b"}], {})
    assert record(open_records(path), 0) == {"caption": "a", "captiom": "b"}
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"captiom", b"caption"))
    with pytest.raises(UserError, match="cannot read .*t: several columns have the name caption$"):
        open_records(path)
    path.write_bytes(whole.replace(b"captiom", b"caption".replace(b"c", b"\x94")))
    with pytest.raises(UserError, match="cannot read .*t: the name of a column is not UTF-8$"):
        open_records(path)


def test_values(tmp_path, write):
    """What JSON has no form for, names of files, nothing, and a sequence of objects as an object of lists."""
    row = {
        "image": {"bytes": None, "path": "a/b.png"},
        "none": {"bytes": None, "path": None},
        "raw": b"\0\1",
        "day": date(2024, 5, 6),
        "price": Decimal("1.50"),
        "texts": {"user": ["a", "b"], "assistant": ["c", "d"]},
        "uneven": {"x": ["a"], "y": ["b", "c"]},
        "nothing": None,
    }
    path = write(tmp_path / "t", [row], {"image": IMAGE, "none": IMAGE})
    found = record(open_records(path), 0)
    assert value(found.pop("raw")) == b"\0\1"
    assert found == {
        "image": "a/b.png",
        "none": None,
        "day": "2024-05-06",
        "price": "1.50",
        "texts": [{"user": "a", "assistant": "c"}, {"user": "b", "assistant": "d"}],
        "uneven": {"x": ["a"], "y": ["b", "c"]},
        "nothing": None,
    }


def test_what_a_medium_is_told_by(tmp_path, write):
    """The same as of a file with the same content; only the time is that of the table."""
    (tmp_path / "a.png").write_bytes(picture(3))
    path = write(tmp_path / "t", [{"image": held(2)}, {"image": held(3)}], {"image": IMAGE})
    address = record(open_records(path), 1)["image"]
    whole = file_metadata(str(tmp_path / "a.png"))
    assert file_metadata(address).size == whole.size
    assert file_metadata(address).mtime_ns == path.stat().st_mtime_ns
    assert fingerprint(address) == fingerprint(str(tmp_path / "a.png"))
    assert fingerprint(record(open_records(path), 0)["image"]) != fingerprint(address)


def test_addresses_hold_anywhere(tmp_path, write, monkeypatch):
    write(tmp_path / "t", [{"image": picture(3)}], {})
    monkeypatch.chdir(tmp_path)
    address = record(open_records(Path("t")), 0)["image"]
    monkeypatch.chdir("/")
    assert value(address) == picture(3)


def test_frames_of_one_video(tmp_path, write):
    frames = [held(k) for k in range(3)]
    path = write(tmp_path / "t", [{"video": frames}], {"video": pa.list_(IMAGE)})
    assert [len(video) for video in record(open_records(path), 0)["video"]] == [3]
    several = [{"bytes": b"\0\0\0\x18ftypmp42", "path": None}] * 2
    path = write(tmp_path / "u", [{"video": several}], {"video": pa.list_(IMAGE)})
    assert all(isinstance(video, str) for video in record(open_records(path), 0)["video"])


@pytest.mark.parametrize("order", [range(12), range(11, -1, -1), [9, 2, 5, 1, 10, 6, 4, 8, 0, 3, 7, 11]])
def test_a_damaged_row_group(tmp_path, order):
    """Rows of the others are read; of its own those before the damage, whatever was asked for before."""
    noise = np.random.default_rng(0)
    rows = [{"image": {"bytes": noise.bytes(300_000), "path": None}} for _ in range(12)]
    whole = tmp_path / "whole"
    columns = pa.table({"image": pa.array([row["image"] for row in rows], IMAGE)})
    options = {"row_group_size": 6, "data_page_size": 1000, "use_dictionary": False, "write_batch_size": 1}
    pq.write_table(columns, whole, write_page_checksum=True, **options)
    content = bytearray(whole.read_bytes())
    content[content.index(rows[8]["image"]["bytes"][:64]) + 5000] ^= 1
    (tmp_path / "broken").write_bytes(content)
    source = open_records(tmp_path / "broken")
    found = {}
    for number in order:
        try:
            found[number] = value(record(source, number)["image"])
        except Problem as problem:
            assert str(problem).startswith(f"broken table: {tmp_path}/broken, from row ")
    read = sorted(found)
    assert set(range(6)) <= set(read) < set(range(8)) | {6, 7}
    assert all(found[number] == rows[number]["image"]["bytes"] for number in read)
    intact = open_records(whole)
    assert value(record(intact, 8)["image"]) == rows[8]["image"]["bytes"]


def test_a_damaged_batch(tmp_path):
    """Offsets that lead out of an Arrow file are a problem of their rows; those of other batches are read."""
    rows = [{"id": f"row{k}", "image": picture(k)} for k in range(6)]
    path = write_arrow(tmp_path / "t", rows, {})
    content = bytearray(path.read_bytes())
    lengths = np.cumsum([0, *(len(picture(k)) for k in range(3, 6))]).astype(np.int32).tobytes()
    at = content.index(lengths)
    content[at + 4 : at + 8] = np.int32(1 << 30).tobytes()
    path.write_bytes(content)
    source = open_records(path)
    assert value(record(source, 1)["image"]) == picture(1)
    with pytest.raises(Problem, match=f"broken table: {path}, batch 2: "):
        source.read(4)


def test_memory_stays_flat(tmp_path, monkeypatch):
    """One row group of 48 MB is read in a few megabytes, as it has pages of a few rows."""
    noise = np.random.default_rng(0)
    table = pa.table({"image": [noise.bytes(400_000) for _ in range(120)]})
    pq.write_table(table, tmp_path / "t", use_dictionary=False, write_batch_size=4)
    size = table.nbytes
    del table
    base, most = pa.total_allocated_bytes(), 0
    monkeypatch.setattr(rows_module, "_KEPT_BYTES", 8 << 20)
    source = open_records(tmp_path / "t")
    for number in range(len(source)):
        value(record(source, number)["image"])
        most = max(most, pa.total_allocated_bytes() - base)
    assert size > 47e6 and most < 20e6
    whole = pq.read_table(tmp_path / "t")
    assert pa.total_allocated_bytes() - base > most and len(whole) == 120


def opened(path):
    """How often this process has a file open or mapped."""
    files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return files.count(str(path)) + sum(line.endswith(str(path)) for line in maps)


def test_files_are_not_held_open(tmp_path, write):
    """However many files a recipe has: but for the last few of parquet, they are open while they are read."""
    paths = [write(tmp_path / f"{i}", [{"id": i, "image": picture(i)}], {}) for i in range(5)]
    sources = [open_records(path) for path in paths]
    assert sum(map(opened, paths)) <= 2
    assert [record(source, 0)["id"] for source in sources] == list(range(5))
    assert sum(map(opened, paths)) > 0
    for source in sources:
        source.close()
    deadline = time.monotonic() + 10  # Arrow's own threads let go of a map when they get to it
    while sum(map(opened, paths)) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sum(map(opened, paths)) <= 2


def test_no_rows(tmp_path, write):
    assert len(open_records(write(tmp_path / "t", [{"id": 1}], {}))) == 1
    empty = pa.table({"id": pa.array([], pa.int64())})
    pq.write_table(empty, tmp_path / "u")
    assert len(open_records(tmp_path / "u")) == 0


def damaged(kind, path):
    table = pa.table({"image": [picture(1)] * 5})
    if kind == "empty":
        path.touch()
    elif kind == "cut off":
        pq.write_table(table, path)
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "compressed":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        write_arrow(path, table.to_pylist(), {}, options=options)
    elif kind == "cut stream":
        write_arrow(path, table.to_pylist(), {})
        path.write_bytes(path.read_bytes()[:-150])
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "is named as a table and holds none"),
        ("cut off", "cannot read .*: Parquet magic bytes not found in footer"),
        ("compressed", "is compressed; write it as parquet, or with save_to_disk of datasets"),
        ("cut stream", "cannot read .*Expected to be able to read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, kind, said):
    with pytest.raises(UserError, match=said) as raised:
        open_records(damaged(kind, tmp_path / "t.parquet"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        "parquet://{}?row=9&value=image",
        "parquet://{}?row=0&value=other",
        "parquet://{}?row=x",
        "parquet://?row=1",
    ]
    + ["parquet://{}?row=0&value=id", "parquet:///none?row=0&value=image"],
)
def test_addresses_of_nothing(tmp_path, address):
    path = write_parquet(tmp_path / "t", [{"image": picture(1), "id": "a"}], {})
    with pytest.raises(Problem, match="missing media"):
        open_media(address.format(path))
    assert Image.open(io.BytesIO(value(f"parquet://{path}?row=0&value=image"))).format == "PNG"

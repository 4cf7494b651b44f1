"""A set of pictures in each container that is read: files, LMDB, tar, parquet, Arrow; and what else reads it.

Pictures of 960x640 (160 KB) with a question each, no two alike.  The peers, where they are installed, decode
every picture to RGB, as preprocessing does beside everything else.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROW_GROUP = 100  # rows, as `datasets` writes pictures
SIZE, SMALL = (960, 640), (64, 48)
_DIFFERENT = 16
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_TURN = pa.struct({"from": pa.string(), "value": pa.string()})


def pictures(count: int, size: tuple[int, int]) -> Iterator[bytes]:
    """JPEG files, no two of the same bytes."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(_DIFFERENT):
        small = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(stream, "JPEG", quality=88)
        files.append(stream.getvalue())
    for k in range(count):
        yield files[k % _DIFFERENT] + k.to_bytes(8)  # behind the end of the picture


def _turns(k: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\nWhat is {k}?"}, {"from": "gpt", "value": f"It is {k}."}]


def _write_lines(path: Path, media: list[dict[str, Any]]) -> None:
    with path.open("w") as lines:
        for k, own in enumerate(media):
            lines.write(json.dumps({"conversations": _turns(k), **own}) + "\n")


def make_files(folder: Path, count: int, size: tuple[int, int]) -> dict[str, str]:
    """JSON lines and picture files."""
    (folder / "files").mkdir()
    for k, content in enumerate(pictures(count, size)):
        (folder / "files" / f"{k}.jpg").write_bytes(content)
    _write_lines(folder / "files.jsonl", [{"image": f"{k}.jpg"} for k in range(count)])
    return {"annotation": "files.jsonl", "root": "files"}


def make_lmdb(folder: Path, count: int, size: tuple[int, int]) -> dict[str, str]:
    """JSON lines and a database."""
    import lmdb

    with lmdb.open(str(folder / "lmdb"), map_size=1 << 34) as database, database.begin(write=True) as writing:
        for k, content in enumerate(pictures(count, size)):
            writing.put(str(k).encode(), content)
    _write_lines(folder / "lmdb.jsonl", [{"lmdb_file": "lmdb", "lmdb_key": str(k)} for k in range(count)])
    return {"annotation": "lmdb.jsonl", "root": "."}


def make_tar(folder: Path, count: int, size: tuple[int, int]) -> dict[str, str]:
    """JSON lines and a tar file, in which each picture has a JSON file beside it, as webdataset wants it."""
    with tarfile.open(folder / "set.tar", "w") as archive:
        for k, content in enumerate(pictures(count, size)):
            for suffix, data in (("jpg", content), ("json", json.dumps(_turns(k)).encode())):
                member = tarfile.TarInfo(f"{k:08d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    _write_lines(folder / "tar.jsonl", [{"image": f"{k:08d}.jpg"} for k in range(count)])
    return {"annotation": "tar.jsonl", "root": "set.tar"}


def _table(contents: list[bytes], first: int) -> pa.Table:
    images = [{"bytes": content, "path": None} for content in contents]
    turns = [_turns(first + k) for k in range(len(contents))]
    columns = {"image": pa.array(images, _IMAGE), "conversations": pa.array(turns, pa.list_(_TURN))}
    return pa.table(columns)


def _tables(count: int, size: tuple[int, int]) -> Iterator[pa.Table]:
    contents: list[bytes] = []
    for k, content in enumerate(pictures(count, size), 1):
        contents.append(content)
        if len(contents) == ROW_GROUP or k == count:
            yield _table(contents, k - len(contents))
            contents = []


def make_parquet(folder: Path, count: int, size: tuple[int, int]) -> dict[str, str]:
    """One parquet file."""
    with pq.ParquetWriter(folder / "set.parquet", _table([], 0).schema) as writer:
        for table in _tables(count, size):
            writer.write_table(table)
    return {"annotation": "set.parquet"}


def make_arrow(folder: Path, count: int, size: tuple[int, int]) -> dict[str, str]:
    """One Arrow stream, as `datasets` saves it."""
    with (
        pa.OSFile(str(folder / "set.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _table([], 0).schema) as out,
    ):
        for table in _tables(count, size):
            out.write_table(table)
    return {"annotation": "set.arrow"}


CONTAINERS: dict[str, Callable[[Path, int, tuple[int, int]], dict[str, str]]] = {
    "files": make_files,
    "LMDB": make_lmdb,
    "tar": make_tar,
    "parquet": make_parquet,
    "Arrow": make_arrow,
}


def run_datasets(folder: Path, entry: dict[str, str]) -> int:
    """Every picture of a parquet file through `datasets`, streamed."""
    import datasets

    file = str(folder / entry["annotation"])
    data = datasets.load_dataset("parquet", data_files=file, split="train", streaming=True)
    data = data.cast_column("image", datasets.Image())
    return sum(np.asarray(row["image"].convert("RGB")).ndim == 3 for row in data)


def run_webdataset(folder: Path, entry: dict[str, str]) -> int:
    """Every picture of a tar file through `webdataset`."""
    import webdataset

    data = webdataset.WebDataset(str(folder / entry["root"]), shardshuffle=False).decode("rgb8")
    return sum(sample["jpg"].ndim == 3 for sample in data)


PEERS: dict[str, tuple[str, Callable[[Path, dict[str, str]], int]]] = {
    "tar": ("webdataset", run_webdataset),
    "parquet": ("datasets", run_datasets),
}
"""What else reads a container, and decodes its pictures."""

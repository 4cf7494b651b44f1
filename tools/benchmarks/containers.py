"""Preprocessing from files, LMDB, tar, parquet and Arrow, beside `datasets` and `webdataset`; and its growth.

The input is made here: pictures of 960x640 (160 KB) with a question each, no two alike.  The peers, where
they are installed, decode every picture to RGB, as preprocessing does beside everything else.  Then parquet
files of more and more rows with small pictures: what memory does.  Each run is a process of its own.
"""

import importlib.util
import io
import json
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.preprocess import make_tokenizer
from benchmarks.report import Report, progress
from PIL import Image

from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings

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


def make_files(folder: Path, count: int) -> dict[str, str]:
    """JSON lines and picture files."""
    (folder / "files").mkdir()
    for k, content in enumerate(pictures(count, SIZE)):
        (folder / "files" / f"{k}.jpg").write_bytes(content)
    _write_lines(folder / "files.jsonl", [{"image": f"{k}.jpg"} for k in range(count)])
    return {"annotation": "files.jsonl", "root": "files"}


def make_lmdb(folder: Path, count: int) -> dict[str, str]:
    """JSON lines and a database."""
    import lmdb

    with lmdb.open(str(folder / "lmdb"), map_size=1 << 34) as database, database.begin(write=True) as writing:
        for k, content in enumerate(pictures(count, SIZE)):
            writing.put(str(k).encode(), content)
    _write_lines(folder / "lmdb.jsonl", [{"lmdb_file": "lmdb", "lmdb_key": str(k)} for k in range(count)])
    return {"annotation": "lmdb.jsonl", "root": "."}


def make_tar(folder: Path, count: int) -> dict[str, str]:
    """JSON lines and a tar file, in which each picture has a JSON file beside it, as webdataset wants it."""
    with tarfile.open(folder / "set.tar", "w") as archive:
        for k, content in enumerate(pictures(count, SIZE)):
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


def make_parquet(folder: Path, count: int, size: tuple[int, int] = SIZE) -> dict[str, str]:
    """One parquet file."""
    name = f"{count}-{size[0]}.parquet"
    with pq.ParquetWriter(folder / name, _table([], 0).schema) as writer:
        for table in _tables(count, size):
            writer.write_table(table)
    return {"annotation": name}


def make_arrow(folder: Path, count: int) -> dict[str, str]:
    """One Arrow stream, as `datasets` saves it."""
    with (
        pa.OSFile(str(folder / "set.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _table([], 0).schema) as out,
    ):
        for table in _tables(count, SIZE):
            out.write_table(table)
    return {"annotation": "set.arrow"}


CONTAINERS: dict[str, Callable[[Path, int], dict[str, str]]] = {
    "files": make_files,
    "LMDB": make_lmdb,
    "tar": make_tar,
    "parquet": make_parquet,
    "Arrow": make_arrow,
}


def run_ours(folder: Path, entry: dict[str, str]) -> int:
    """One run of this project's preprocessing in this process; how many samples it kept."""
    (folder / "recipe.json").write_text(json.dumps({"data": entry}))
    settings = PreprocessSettings(str(folder / "tokenizer"), (8192,))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        manifest = preprocess(folder / "recipe.json", folder / "store", settings, Execution(1, fresh=True))
    return int(manifest.counts["8192"]["kept"])


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


WAYS = {"ours": run_ours, "datasets": run_datasets, "webdataset": run_webdataset}


def _measure(way: str, folder: Path, entry: dict[str, str]) -> dict[str, float]:
    """In a process of its own: samples, seconds, the most memory above what it began with."""
    Path("/proc/self/clear_refs").write_text("5")  # the most memory so far is forgotten
    memory, wall, cpu = _most_memory(), time.perf_counter(), time.process_time()
    samples = WAYS[way](folder, entry)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"samples": samples, "wall s": wall, "CPU s": cpu, "MB": _most_memory() - memory}


def _most_memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def _measured(way: str, folder: Path, entry: dict[str, str], count: int, megabytes: float) -> dict[str, Any]:
    progress(f"{way}: {entry['annotation']}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_measure, (way, folder, entry))
    if found["samples"] != count:
        raise RuntimeError(f"{way} has {found['samples']} samples of {count}")
    return {
        "samples": count,
        "MB of media": megabytes,
        "wall s": found["wall s"],
        "CPU s": found["CPU s"],
        "samples per CPU s": count / found["CPU s"],
        "MB per CPU s": megabytes / found["CPU s"],
        "memory MB": found["MB"],
    }


def run(large: bool = False) -> Report:
    """Samples and megabytes per second of one core, and the most memory."""
    count, grown = (3000, (1_000, 10_000, 100_000)) if large else (200, (500, 2_000))
    megabytes = sum(map(len, pictures(count, SIZE))) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder)
        for container, make in CONTAINERS.items():
            progress(f"making {container}")
            entry = make(folder, count)
            peers = {"tar": ["webdataset"], "parquet": ["datasets"]}.get(container, [])
            for way in ("ours", *(peer for peer in peers if importlib.util.find_spec(peer))):
                row = _measured(way, folder, entry, count, megabytes)
                what = "preprocessed" if way == "ours" else f"decoded by {way}"
                rows.append({"from": container, "what": what, **row})
        for n in grown:
            entry = make_parquet(folder, n, SMALL)
            small = sum(map(len, pictures(n, SMALL))) / 1e6
            row = _measured("ours", folder, entry, n, small)
            rows.append({"from": "parquet, small pictures", "what": "preprocessed", **row})
    return Report("pictures of 960x640, one process; small ones have 64x48", rows, "--large" * large)

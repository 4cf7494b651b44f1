"""The token store: opening it and reading samples, beside JSON lines and whole Arrow rows.

The rows are those of a mix of text, pictures and clips of 16 frames, a thousand different ones again and
again.  Each contestant runs in a process of its own.  Memory is anonymous memory (not that of mapped files)
beyond what the imports take; a sample is its ids, answers and columns, read at random from rows that lie
close enough to be in memory (warm) and from anywhere (cold).
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from benchmarks.report import REPO, Report, progress

from megatron_eagle.data.store.manifest import DataManifest
from megatron_eagle.data.store.reader import (
    BATCH_ROWS,
    SCHEMA,
    ImagePlan,
    SampleColumns,
    SampleStore,
    VideoPlan,
)
from megatron_eagle.data.store.token_file import TokenFileWriter, write_token_index

LENGTH = 32768
JSON_LIMIT = 100_000  # rows of the JSON lines file: ids as text take ten times the room
READS = 2000


def make_columns(row: int) -> SampleColumns:
    """Row `row` of the mix: text, a picture, or a clip."""
    generator = np.random.default_rng(row)
    kind = row % 4
    text = int(generator.integers(50, 1500))
    image = ImagePlan(f"/data/pictures/{row:08d}.jpg", 150_000, 1, 1280, 720, 4, 2)
    frames = tuple(range(0, 480, 30))
    file = f"/data/clips/{row:08d}.mp4"
    video = VideoPlan(file, 10**7, 1, 1, 0, 0, 1, 15360, 16, 1, 480, 0, "", frames, frames, frames)
    n_tiles = (0, 9, 9, 16)[kind]
    return SampleColumns(
        source=0,
        line=row + 1,
        n_tokens=text + 256 * n_tiles,
        n_text=text,
        n_visual=256 * n_tiles,
        n_supervised=text // 2,
        answer_lengths=(text // 2,),
        n_tiles=n_tiles,
        tiles_wanted=9 * (kind in (1, 2)),
        n_frames=16 * (kind == 3),
        frames_wanted=16 * (kind == 3),
        images=(image,) * (kind in (1, 2)),
        videos=(video,) * (kind == 3),
        documents=(),
        media_order=((), (0,), (0,), (-1,))[kind],
    )


def make_store(folder: Path, rows: int) -> None:
    """A store whose rows repeat the first thousand, tokens included: only its size is real."""
    columns = [make_columns(row) for row in range(BATCH_ROWS)]
    target = folder / str(LENGTH)
    target.mkdir(parents=True)
    lengths = np.array([c.n_tokens for c in columns], np.int32)
    for name, dtype in (("tokens", np.int32), ("answers", np.uint16)):
        writer = TokenFileWriter(target / name, dtype)
        for n in lengths.tolist():
            writer.add(np.arange(n).astype(dtype))
        writer.close()
        write_token_index(target / name, dtype, lengths, np.arange(rows) % BATCH_ROWS)
    batch = pa.RecordBatch.from_pylist([asdict(c) for c in columns], SCHEMA)
    with pa.OSFile(str(target / "samples.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as out:
        for start in range(0, rows, BATCH_ROWS):
            out.write_batch(batch.slice(0, rows - start))
    sizes: dict[str, Any] = {"tile_size": 448, "patch_size": 14, "tokens_per_tile": 256}
    ids: dict[str, Any] = {"vocab_size": 1, "image_token_id": 0, "pad_token_id": 0}
    DataManifest(
        "", "train", **sizes, **ids, lengths=[LENGTH], sources=["a.jsonl"], sampling={}, max_pixels=1
    ).save(folder)


def make_json_lines(folder: Path, rows: int) -> None:
    """The same samples, one JSON object a line, with ids and answers as lists."""
    lines = []
    for row in range(BATCH_ROWS):
        columns = make_columns(row)
        ids = list(range(columns.n_tokens))
        lines.append(json.dumps({**asdict(columns), "ids": ids, "answers": [0] * len(ids)}) + "\n")
    with (folder / "samples.jsonl").open("w") as out:
        for start in range(0, rows, BATCH_ROWS):
            out.writelines(lines[: rows - start])


def open_ours(folder: Path) -> tuple[int, Callable[[int], object]]:
    """`SampleStore`."""
    store = SampleStore(folder)
    return len(store), store.__getitem__


def open_arrow(folder: Path) -> tuple[int, Callable[[int], object]]:
    """The same files, rows by `Table.slice(...).to_pylist()`, as one would write it first."""
    table = pa.ipc.open_file(pa.memory_map(str(folder / str(LENGTH) / "samples.arrow"))).read_all()
    store = SampleStore(folder)
    return len(table), lambda row: (table.slice(row, 1).to_pylist()[0], store.tokens[row], store.answers[row])


def open_json_lines(folder: Path) -> tuple[int, Callable[[int], object]]:
    """Line offsets found by reading the file once, then `json.loads` of a line."""
    file = (folder / "samples.jsonl").open("rb")
    offsets = [0]
    for line in file:
        offsets.append(offsets[-1] + len(line))

    def read(row: int) -> object:
        file.seek(offsets[row])
        return json.loads(file.readline())

    return len(offsets) - 1, read


CONTESTANTS = {"ours": open_ours, "arrow rows": open_arrow, "json lines": open_json_lines}


def measure(contestant: str, folder: str) -> None:
    """Print seconds to open, MB of anonymous memory for it, and microseconds per warm and cold sample."""
    before = _anonymous_megabytes()
    start = time.perf_counter()
    n_rows, read = CONTESTANTS[contestant](Path(folder))
    seconds = time.perf_counter() - start
    megabytes = _anonymous_megabytes() - before
    generator = np.random.default_rng(0)
    near = generator.integers(0, min(n_rows, 16 * BATCH_ROWS), READS).tolist()
    far = generator.integers(0, n_rows, READS).tolist()
    for row in near:
        read(row)
    times = []
    for rows in (near, far):
        start = time.perf_counter()
        for row in rows:
            read(row)
        times.append(1e6 * (time.perf_counter() - start) / len(rows))
    print(json.dumps([seconds, megabytes, *times]))


def _anonymous_megabytes() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def run(large: bool = False) -> Report:
    """Measure every contestant at every size."""
    rows = []
    for count in (100_000, 1_000_000) + ((10_000_000,) if large else ()):
        with tempfile.TemporaryDirectory() as folder:
            progress(f"making {count:,} samples")
            make_store(Path(folder), count)
            if count <= JSON_LIMIT:
                make_json_lines(Path(folder), count)
            for name in CONTESTANTS:
                if name == "json lines" and count > JSON_LIMIT:
                    continue
                progress(f"{name}, {count:,} samples")
                code = f"from benchmarks.store import measure; measure({name!r}, {folder!r})"
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    cwd=REPO / "tools",
                    env={"PYTHONPATH": str(REPO)},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                seconds, megabytes, warm, cold = json.loads(done.stdout)
                rows.append(
                    {
                        "samples": count,
                        "reader": name,
                        "open s": seconds,
                        "anonymous MB": megabytes,
                        "us per sample, warm": warm,
                        "us per sample, cold": cold,
                    }
                )
    return Report("opening a store and reading samples of 2,700 tokens on average", rows, "--large" * large)

"""A store stays quick and small in memory, however many samples it has."""

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_eagle.data.preparation.journal import Journal
from megatron_eagle.data.store import writer
from megatron_eagle.data.store.manifest import DataManifest
from megatron_eagle.data.store.reader import BATCH_ROWS, SCHEMA, ImagePlan, SampleColumns, SampleStore
from megatron_eagle.data.store.token_file import TokenFileWriter, write_token_index

N_ROWS = 300_000


def columns(row):
    pictures = tuple(ImagePlan(f"/data/{row}-{k}.jpg", 10, 1, 640, 480, 4, 3) for k in range(row % 3))
    n_tiles = 13 * len(pictures)
    n_text = 50 + row
    return SampleColumns(
        source=0,
        line=row + 1,
        n_tokens=n_text + n_tiles,
        n_text=n_text,
        n_visual=n_tiles,
        n_supervised=7,
        answer_lengths=(3, 4),
        n_tiles=n_tiles,
        tiles_wanted=n_tiles,
        n_frames=0,
        frames_wanted=0,
        images=pictures,
        videos=(),
        documents=(),
        media_order=tuple(range(len(pictures))),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store that repeats its first thousand rows: written quickly, but of the size that it says."""
    folder = tmp_path_factory.mktemp("large")
    target = folder / "9999"
    target.mkdir()
    rows = [columns(row) for row in range(BATCH_ROWS)]
    lengths = np.array([row.n_tokens for row in rows], np.int32)
    for name, dtype in (("tokens", np.int32), ("answers", np.uint16)):
        tokens = TokenFileWriter(target / name, dtype)
        for n in lengths.tolist():
            tokens.add(np.arange(n).astype(dtype))
        tokens.close()
        write_token_index(target / name, dtype, lengths, np.arange(N_ROWS) % BATCH_ROWS)
    batch = pa.RecordBatch.from_pylist([asdict(row) for row in rows], SCHEMA)
    with pa.ipc.new_file(str(target / "samples.arrow"), SCHEMA) as out:
        for start in range(0, N_ROWS, BATCH_ROWS):
            out.write_batch(batch.slice(0, N_ROWS - start))
    sizes = {"tile_size": 28, "patch_size": 14, "tokens_per_tile": 1}
    ids = {"vocab_size": 9, "image_token_id": 0, "pad_token_id": 0}
    manifest = DataManifest(
        "f", "train", **sizes, **ids, lengths=[9999], sources=["a"], sampling={}, max_pixels=1
    )
    manifest.save(folder)
    return folder


def test_rows_come_back_as_they_were(path):
    store = SampleStore(path)
    assert len(store) == N_ROWS
    for row in (0, 1, 2, 1023, 1024, 5000, N_ROWS - 1):
        sample, expected = store[row], columns(row % BATCH_ROWS)
        assert {name: getattr(sample, name) for name in SCHEMA.names} == {
            name: getattr(expected, name) for name in SCHEMA.names
        }
        assert sample.ids.tolist() == list(range(expected.n_tokens))


def test_a_warm_sample_takes_less_than_100_microseconds(path):
    store = SampleStore(path)
    rows = np.random.default_rng(0).integers(0, 16 * BATCH_ROWS, 1000).tolist()
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for row in rows:
            store[row]
        seconds.append(time.process_time() - start)
    assert min(seconds) / len(rows) < 100e-6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_reads_nothing(path):
    """Anonymous memory and time to open hardly depend on the number of rows."""
    code = f"""
import time
from megatron_eagle.data.store.reader import SampleStore
def megabytes():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024
before, start = megabytes(), time.process_time()
store = SampleStore({str(path)!r})
assert len(store) == {N_ROWS}
print(time.process_time() - start, megabytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 0.5
    assert megabytes < 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("repeats", [1, 2])
def test_tables_are_written_in_the_memory_of_a_few_batches(tmp_path, monkeypatch, repeats):
    """From the entries of a journal, one at a time and not mapped: pages that were read would count."""
    entries, n = 60, BATCH_ROWS // 2
    journal = Journal(tmp_path / "journal", "key")
    entry = pa.Table.from_pylist([asdict(columns(row)) for row in range(n)], SCHEMA)
    for _ in range(entries):
        journal.commit(n, [], {8: entry})
    order = np.tile(np.arange(entries * n), repeats) if repeats > 1 else None
    before, held = pa.total_allocated_bytes(), []

    def look(value):
        assert str(tmp_path / "journal") not in Path("/proc/self/maps").read_text()
        held.append((pa.total_allocated_bytes() - before) / entry.nbytes)
        return value

    some_rows = writer._rows
    monkeypatch.setattr(writer, "_rows", lambda *some: look(some_rows(*some)))
    writer.write_tables(tmp_path, map(look, journal.tables(8)), order)
    assert len(held) == entries + entries // 2 * repeats * (repeats > 1)
    assert 1 <= max(held) < 20
    whole = list(map(look, journal.tables(8)))
    assert max(held) >= entries, "what is held is seen"
    with pa.ipc.open_file(str(tmp_path / "samples.arrow")) as file:
        assert file.num_record_batches == entries // 2 * repeats
        assert file.read_all().equals(pa.concat_tables(whole * repeats))

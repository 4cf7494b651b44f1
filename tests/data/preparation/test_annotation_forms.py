"""The same records in every form of file make the same samples, whoever works on them and however often."""

import gzip
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megatron_eagle.data.inspection.mix import recipe_mix, store_mix
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.report import kept_of_datasets
from megatron_eagle.data.store.reader import SampleStore
from tests.data.annotations.test_records import write
from tests.data.helpers import call_tool, contents, conversation, make_image, make_video, write_jsonl
from tests.data.killed import EXECUTION, settings
from tests.paths import REPO

N = 24
RECORDS = [
    conversation("<image>?", f"Picture {k}.", image="a.png")
    if k % 3
    else {"query": "Hi", "response": "Ho " * (k + 1)}
    for k in range(N)
]


@pytest.fixture
def folder(tmp_path):
    make_image(tmp_path / "a.png", (112, 56))
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    array = b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=1).encode()
    for name, data in (("a.jsonl", lines), ("b.json", array), ("c.jsonl.gz", lines), ("d.json.zst", array)):
        write(tmp_path / name, data)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1.json").write_text(json.dumps(RECORDS[:10]))
    (tmp_path / "parts" / "2.jsonl.gz").write_bytes(gzip.compress(b"".join(lines.splitlines(True)[10:])))
    return tmp_path


def recipe(folder, **entry):
    path = folder / "r.json"
    path.write_text(json.dumps({"d": {"root": str(folder), **entry}}))
    return path


def rows(folder, length=300):
    """Ids and answers of every row, and where it is from."""
    store = SampleStore(folder, length)
    samples = [store[row] for row in range(len(store))]
    return [(s.ids.tolist(), s.answers.tolist(), s.images) for s in samples], [s.line for s in samples]


def test_every_form_gives_the_same_rows(folder, tokenizer_dir):
    stores = {}
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.json.zst", "parts"):
        for workers in (1, 2) if name in ("b.json", "parts") else (1,):
            output = folder / "stores" / f"{name}-{workers}"
            preprocess(
                recipe(folder, annotation=name), output, settings(str(tokenizer_dir)), Execution(workers)
            )
            stores[name, workers] = output
    expected, lines = rows(stores["a.jsonl", 1])
    assert lines == [*range(1, N + 1)] and len(expected) == N
    for (name, _), output in stores.items():
        found, lines = rows(output)
        assert found == expected
        assert lines == ([*range(1, 11), *range(1, N - 9)] if name == "parts" else [*range(1, N + 1)])
    for name in ("b.json", "parts"):
        assert contents(stores[name, 1]) == contents(stores[name, 2])
    # The files of an entry are one data set, wherever its samples are counted.
    store = SampleStore(stores["parts", 1])
    assert store.manifest.datasets == ["d"] and len(store.manifest.sources) == 2
    (kept,) = [kept for kept in kept_of_datasets(store.path) if kept.length == 300]
    assert (kept.name, kept.rows) == ("d", N)
    assert [line.split()[:2] for line in store_mix(store).splitlines()[2:3]] == [["d", "24"]]
    assert recipe_mix(recipe(folder, annotation="parts")).splitlines()[2].split()[:2] == ["d", "24"]


@pytest.mark.parametrize("name", ["b.json", "parts", "d.json.zst"])
def test_killed_and_continued(folder, tokenizer_dir, name):
    expected = folder / "expected" / "store"
    made = recipe(folder, annotation=name, repeat_time=1.5)
    preprocess(made, expected, settings(str(tokenizer_dir)), Execution(1))
    output = folder / "killed" / "store"
    arguments = [str(value) for value in (made, output, tokenizer_dir, "add", 23, "after")]
    done = subprocess.run([sys.executable, "-m", "tests.data.killed", *arguments], cwd=REPO, check=False)
    assert done.returncode == -signal.SIGKILL
    preprocess(made, output, settings(str(tokenizer_dir)), EXECUTION)
    assert contents(output) == contents(expected)


def test_how_records_are_read_is_part_of_what_a_store_follows_from(folder, tokenizer_dir, capsys):
    """It is made again when the recipe reads the same file otherwise, and kept when it does not."""
    output, chosen = folder / "store", replace(settings(str(tokenizer_dir)), lengths=(100,))
    for entry, kept in (
        ({}, False),
        ({}, True),
        ({"ignore": ["zzz"]}, False),
        ({"sampling_strategy": "first:5"}, False),
        ({"columns": {"instruction": "ask"}}, False),
        ({"columns": {"instruction": "ask"}}, True),
    ):
        preprocess(recipe(folder, annotation="b.json", **entry), output, chosen, Execution(1))
        assert ("up to date" in capsys.readouterr().out) == kept
    preprocess(recipe(folder, annotation="b.json", sampling_strategy="end:5"), output, chosen, Execution(1))
    assert SampleStore(output)[0].line == N - 4 and len(SampleStore(output)) == 5


def test_the_ledger_has_the_numbers_of_elements(folder, tokenizer_dir):
    (folder / "b.json").write_text('[{"query": "a", "response": "b"}, {broken}, {"query": "a"}]')
    preprocess(
        recipe(folder, annotation="b.json"), folder / "store", settings(str(tokenizer_dir)), Execution(1)
    )
    ledger = [json.loads(line) for line in (folder / "store" / "dropped.jsonl").open()]
    assert [(entry["line"], entry["kind"]) for entry in ledger] == [(2, "broken JSON"), (3, "unknown format")]


def test_more_files_than_may_be_open(folder, tokenizer_dir):
    import resource

    (folder / "many").mkdir()
    for k in range(120):
        write_jsonl(folder / "many" / f"{k:03d}.jsonl", [{"query": "a", "response": f"b{k}"}])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Other tests of this process have some open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, before[1]))
    try:
        made = recipe(folder, annotation="many")
        chosen = replace(settings(str(tokenizer_dir)), lengths=(100,))
        preprocess(made, folder / "store", chosen, Execution(1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert np.array_equal(np.asarray(SampleStore(folder / "store").column("source")), np.arange(120))


def test_copies_of_videos_keep_every_dialect(folder, tokenizer_dir):
    """Transcoding an array of two dialects gives annotations that read the same, with other videos."""
    make_video(folder / "v.mp4", 20)
    records = [
        conversation("<video>", "x", video="v.mp4", mood="good", start=0.5),
        {"q": "What?", "a": "x", "video_id": "v"},
        {"QA": [{"q": "What?", "a": "x"}], "clip_path": "v.mp4"},
        conversation("<video>", "x", video=["a.png", "a.png"], fps=1),
    ]
    (folder / "b.json").write_text(json.dumps(records, indent=1))
    made = recipe(
        folder, annotation=["b.json", "parts/1.json"], ignore=["mood"], columns={"video": "clip_path"}
    )
    done = call_tool(
        "preprocess_data", "transcode", made, "--output", folder / "out", "--size", 64, "--workers", 1
    )
    assert done.returncode == 0 and done.stdout.startswith("1 copies"), done.stderr
    chosen = replace(settings(str(tokenizer_dir)), lengths=(300,))
    stores = []
    for number, path in enumerate((made, folder / "out" / "recipe.json")):
        preprocess(path, folder / f"store{number}", chosen, Execution(1))
        stores.append(SampleStore(folder / f"store{number}"))
    old, new = stores
    assert len(old) == len(new) == 14
    for row in range(14):
        assert old[row].ids.tolist() == new[row].ids.tolist()
        assert [video.times for video in old[row].videos] == [video.times for video in new[row].videos]
    paths = [[video.path for video in store[row].videos] for store in stores for row in range(3)]
    assert (
        paths
        == [[str(folder / "v.mp4")]] * 3
        + [[str(folder / "out/videos" / folder.relative_to("/") / "v.mp4")]] * 3
    )

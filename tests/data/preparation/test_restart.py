"""Killed anywhere and started again, preprocessing ends with the same bytes and repeats one shard at most."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from megatron_eagle.data.preparation.journal import Journal
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import SampleProcessor
from megatron_eagle.data.store.reader import SCHEMA, SampleStore
from megatron_eagle.data.store.writer import StoreWriter
from megatron_eagle.errors import UserError
from megatron_eagle.problems import LedgerEntry
from tests.data.helpers import contents, conversation, make_image, make_video, write_jsonl
from tests.data.killed import EXECUTION, settings
from tests.paths import REPO

N_LINES = 30


@pytest.fixture
def recipe(tmp_path):
    """Text, pictures and broken lines; some rows are repeated."""
    make_image(tmp_path / "a.png", (112, 56))
    records = []
    for k in range(N_LINES):
        picture = conversation("<image>?", f"Picture {k}.", image="a.png")
        records.append([conversation("Hello", "Hi " * (k + 1)), picture, "{broken"][k % 3])
    write_jsonl(tmp_path / "data.jsonl", records)
    (tmp_path / "recipe.json").write_text('{"d": {"annotation": "data.jsonl", "repeat_time": 1.5}}')
    return tmp_path / "recipe.json"


@pytest.fixture
def worked(monkeypatch):
    """Lines that are processed in this process."""
    lines = []
    original = SampleProcessor.process
    monkeypatch.setattr(
        SampleProcessor, "process", lambda self, task: (lines.append(task.line), original(self, task))[1]
    )
    return lines


# Where it is killed, and how many lines are done by then.
KILLS = [
    (("add", 1, "before"), 0),
    (("add", 11, "after"), 4),  # tokens are written that no entry knows of
    (("rename", 3, "before"), 8),  # an entry is written, but does not count yet
    (("rename", 3, "after"), 12),
    (("ledger", 1, "before"), 30),  # the tables are being written
    (("rename", 9, "after"), 30),  # the old store is moved away
    (("rename", 10, "after"), 30),  # the new one is in place, the journal is still there
]


def test_killed_anywhere(tmp_path, recipe, tokenizer_dir, worked):
    expected = tmp_path / "expected" / "store"
    preprocess(recipe, expected, settings(str(tokenizer_dir)), Execution(1))
    everything = contents(expected)
    running = []
    for i, (kill, _) in enumerate(KILLS):
        output = tmp_path / f"{i}" / "store"
        old = replace(settings(str(tokenizer_dir)), lengths=(50,))
        preprocess(recipe, output, old, Execution(1))  # what is there before
        arguments = [str(value) for value in (recipe, output, tokenizer_dir, *kill)]
        running.append(subprocess.Popen([sys.executable, "-m", "tests.data.killed", *arguments], cwd=REPO))
    for i, (process, (_, done)) in enumerate(zip(running, KILLS, strict=True)):
        assert process.wait() == -signal.SIGKILL
        output = tmp_path / f"{i}" / "store"
        worked.clear()
        preprocess(recipe, output, settings(str(tokenizer_dir)), EXECUTION)
        assert contents(output) == everything
        assert not list(output.parent.glob(".store*"))
        assert worked == list(range(done + 1, N_LINES + 1))


def test_killed_workers_do_not_stay(tmp_path, recipe, tokenizer_dir):
    """The real tool with two workers, killed from outside while it reads videos, then run again."""
    make_video(tmp_path / "v.mp4", 60)
    records = [conversation("<video>", f"Clip {k}.", video="v.mp4") for k in range(300)]
    write_jsonl(tmp_path / "data.jsonl", records)
    command = [sys.executable, str(REPO / "tools" / "preprocess_data.py"), "run", "--recipe", str(recipe)]
    command += [
        "--tokenizer",
        str(tokenizer_dir),
        "--max-tokens",
        "300",
        "--tile-size",
        "28",
        "--workers",
        "2",
    ]

    def run(name, **options):
        return subprocess.Popen([*command, "--output", str(tmp_path / name)], **options)

    with (tmp_path / "errors").open("w") as errors:
        process = run("killed", stderr=errors)
        deadline = time.monotonic() + 60
        while "%" not in (tmp_path / "errors").read_text().replace(" 0%", "") and time.monotonic() < deadline:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.kill()
        process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    again = run("killed", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    straight = run("straight", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert again.communicate()[0]
    assert (again.returncode, straight.wait()) == (0, 0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_store_that_is_there_is_kept(tmp_path, recipe, tokenizer_dir, worked, capsys):
    chosen = settings(str(tokenizer_dir))
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    output = tmp_path / "store"

    def again(execution=EXECUTION, new=chosen):
        worked.clear()
        preprocess(recipe, output, new, execution)
        return len(worked)

    assert again() == N_LINES
    assert again() == 0
    assert "is up to date" in capsys.readouterr().out
    assert again(replace(EXECUTION, fresh=True)) == N_LINES
    for changed in (
        replace(chosen, lengths=(100,)),
        replace(chosen, template="hf"),
        replace(chosen, max_pixels=10**6),
        replace(chosen, sampling=replace(chosen.sampling, fps=1.0)),
        replace(chosen, sampling=replace(chosen.sampling, max_tiles=4)),
    ):
        assert again(new=changed) == N_LINES
        assert again(new=changed) == 0
    make_image(tmp_path / "a.png", (56, 56), seed=1)
    assert again(new=changed) == N_LINES
    recipe.write_text(recipe.read_text().replace("1.5", "1"))
    assert again(new=changed) == N_LINES
    recipe.write_text(recipe.read_text().replace("1}", '1, "max_tiles": 2}'))
    assert again(new=changed) == N_LINES
    write_jsonl(tmp_path / "data.jsonl", lines[:-1])
    assert again(new=changed) == N_LINES - 1
    write_jsonl(tmp_path / "data.jsonl", [*lines, conversation("<image>", "x", image="none.png")])
    assert again(new=changed) == N_LINES + 1
    capsys.readouterr()
    assert again(new=changed) == 0
    assert "1 lines were dropped for their media (dropped.jsonl); --retry-failed" in capsys.readouterr().out
    assert len(SampleStore(output)) == 20


def test_only_what_failed_is_tried_again(tmp_path, recipe, tokenizer_dir, worked):
    """And the store has the bytes of one that is made from nothing."""
    chosen = settings(str(tokenizer_dir))
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    for place, name in ((3, "b.png"), (17, "c.png"), (40, "d.png")):
        lines.insert(place, conversation("<image>?", f"A {name}.", image=name))
    write_jsonl(tmp_path / "data.jsonl", lines)
    retry = replace(EXECUTION, retry_failed=True)
    for place, number, execution in (("one", 1, retry), ("two", 2, replace(retry, workers=2))):
        for name in ("b.png", "c.png", "d.png"):
            (tmp_path / name).unlink(missing_ok=True)
        output = tmp_path / place / "store"
        preprocess(recipe, output, chosen, EXECUTION)
        for name in ("b.png", "c.png", "d.png")[:number]:
            make_image(tmp_path / name, (56, 112))
        worked.clear()
        preprocess(recipe, output, chosen, execution)
        assert worked == [4, 18, 33]
        preprocess(recipe, tmp_path / place / "new" / "store", chosen, EXECUTION)
        assert contents(output) == contents(tmp_path / place / "new" / "store")
        worked.clear()
        preprocess(recipe, output, chosen, EXECUTION)
        assert worked == []


@pytest.mark.parametrize("again", [EXECUTION, replace(EXECUTION, retry_failed=True)])
def test_an_interrupted_retry_is_continued(tmp_path, recipe, tokenizer_dir, worked, monkeypatch, again):
    chosen = settings(str(tokenizer_dir))
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    write_jsonl(tmp_path / "data.jsonl", [*lines, conversation("<image>?", "A.", image="b.png")])
    output = tmp_path / "store"
    preprocess(recipe, output, chosen, EXECUTION)
    before = contents(output)
    make_image(tmp_path / "b.png", (56, 112))
    original, calls = StoreWriter.add, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) > 15:
            raise OSError(28, "No space left on device")
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", full)
        with pytest.raises(UserError, match="No space left on device"):
            preprocess(recipe, output, chosen, replace(EXECUTION, retry_failed=True))
    assert contents(output) == before
    worked.clear()
    preprocess(recipe, output, chosen, again)
    assert worked == ([N_LINES + 1] if again.retry_failed else list(range(9, N_LINES + 2)))
    preprocess(recipe, tmp_path / "new" / "store", chosen, EXECUTION)
    assert contents(output) == contents(tmp_path / "new" / "store")


def test_an_interruption_is_continued(tmp_path, recipe, tokenizer_dir, worked, monkeypatch, capsys):
    output = tmp_path / "store"
    original = StoreWriter.add
    calls = []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) > 15:
            raise OSError(28, "No space left on device")
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", full)
        with pytest.raises(UserError, match="cannot write .*store: No space left on device; when that is"):
            preprocess(recipe, output, settings(str(tokenizer_dir)), EXECUTION)
    assert not output.exists()
    worked.clear()
    preprocess(recipe, output, settings(str(tokenizer_dir)), EXECUTION)
    assert worked[0] == 9  # both lengths of 2 of 3 lines: 15 rows are 11 lines, of which 8 were recorded
    assert "continuing: 8 of 30 lines are done" in capsys.readouterr().out
    # Settings that differ begin again; so does a run whose token files somebody has shortened.
    for spoil in (lambda: None, lambda: os.truncate(tmp_path / ".store.partial/300/tokens.bin", 10)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "add", full)
            with pytest.raises(UserError):
                preprocess(recipe, output, settings(str(tokenizer_dir)), replace(EXECUTION, fresh=True))
        spoil()
        worked.clear()
        lengths = (100, 300) if spoil.__code__.co_names else (200,)
        preprocess(recipe, output, replace(settings(str(tokenizer_dir)), lengths=lengths), EXECUTION)
        assert len(worked) == N_LINES


def test_journal(tmp_path):
    journal = Journal(tmp_path / "j", "key")
    with pytest.raises(UserError, match="another process is working in"):
        Journal(tmp_path / "j", "key")
    entry = LedgerEntry("f", 1, "reason", "kind")
    journal.commit(3, [entry], {8: SCHEMA.empty_table()})
    (tmp_path / "j" / "new").mkdir()
    journal.close()
    journal = Journal(tmp_path / "j", "key")
    assert (journal.n_lines, journal.dropped, journal.n_tokens(8)) == (3, [entry], 0)
    journal.close()
    journal = Journal(tmp_path / "j", "other")
    assert (journal.n_lines, journal.dropped) == (0, [])
    journal.remove()
    assert not (tmp_path / "j").exists()


def test_execution_mistakes():
    with pytest.raises(UserError, match="--workers must be at least 1, got 0"):
        Execution(0)
    with pytest.raises(UserError, match="--engine must be one of local, ray, got slurm"):
        Execution(engine="slurm")


def test_ray_is_asked_for_by_name(tmp_path, recipe, tokenizer_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray needs Ray: pip install"):
        preprocess(recipe, tmp_path / "store", settings(str(tokenizer_dir)), Execution(engine="ray"))


@pytest.mark.parametrize("follow", [0, 4])
def test_ray_gives_the_same_bytes(tmp_path, recipe, tokenizer_dir, follow):
    pytest.importorskip("ray")
    chosen = settings(str(tokenizer_dir))
    preprocess(recipe, tmp_path / "ray" / "store", chosen, Execution(2, engine="ray"), follow=follow)
    preprocess(recipe, tmp_path / "local" / "store", chosen, Execution(1), follow=follow)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")

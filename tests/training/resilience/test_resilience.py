"""A run that is told to stop, whose loss jumps or is no number, whose ranks stand still or die."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

import psutil
import pytest
import torch

from megatron_eagle.checkpoint import checkpoint_folder, has_checkpoint, read_train_state, saving
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring import heartbeat
from megatron_eagle.training.monitoring.heartbeat import (
    EXIT_HANG,
    Beat,
    Heartbeat,
    describe_beats,
    read_beats,
)
from megatron_eagle.training.monitoring.metrics import read_events, read_metrics, read_steps
from megatron_eagle.training.resilience import faults
from megatron_eagle.training.resilience.policy import LossGuard, Preempted, ResilienceConfig, stop_signals
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.stages import load_stages, train_stages
from megatron_eagle.training.train import standard_observers, train
from tests.data.helpers import contents
from tests.parallel.harness import launch
from tests.training.synthetic_data import SyntheticLoader
from tests.training.test_training_loop import train_rank, values, write_run


class SignallingLoader(SyntheticLoader):
    """The last rank gets a SIGUSR1 while it reads the second global batch."""

    def step(self, consumed_packs):
        if consumed_packs == self._batch and torch.distributed.get_rank() == self._signalled:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().step(consumed_packs)

    @property
    def _signalled(self):
        return torch.distributed.get_world_size() - 1


def train_signalled(config: str, world_size: int, overrides: list[str]) -> str:
    """On each rank: train until the signal -> what the run says."""
    with pytest.raises(Preempted) as stopped:
        train(load_run_config(config, overrides, world_size=world_size), open_loader=SignallingLoader)
    return str(stopped.value)


def train_faulty(config: str, world_size: int, overrides: list[str], suffered: list[dict]):
    """On each rank: train with faults."""
    with patch.dict(os.environ, {faults.VARIABLE: json.dumps(suffered)}):
        return train_rank(config, world_size, overrides)


@pytest.fixture
def run(tmp_path):
    """`run(*overrides, suffered=[...])` trains in one process; `run.logs` is where it logs."""
    write_run(tmp_path)
    run = lambda *overrides, suffered=(): train_faulty(  # noqa: E731
        str(tmp_path / "run.yaml"), 1, list(overrides), list(suffered)
    )
    run.config, run.root, run.logs = str(tmp_path / "run.yaml"), tmp_path / "run", tmp_path / "run" / "logs"
    run.metrics = lambda: values(read_metrics(run.logs / "metrics.jsonl"))
    return run


def test_a_signal_to_one_rank_saves_and_ends_all(run):
    run()
    whole = run.metrics()
    shutil.rmtree(run.root)
    cp2 = ["parallel.context_parallel_size=2"]
    stopped = launch(train_signalled, 2, run.config, 2, cp2)
    assert set(stopped) == {"stopped by a signal after iteration 2, which is saved"}
    assert read_train_state(run.root).iteration == 2
    launch(train_rank, 2, run.config, 2, cp2)
    told = [(event["iteration"], event["event"]) for event in read_events(run.logs / "events.jsonl")]
    assert told == [(2, "preempted"), (2, "resumed")]
    found = run.metrics()
    assert [m[0] for m in found] == [1, 2, 3, 4, 5, 6]
    assert [m[1] for m in found] == pytest.approx([m[1] for m in whole], rel=1e-4)


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_nan_is_skipped_with_a_record(run):
    run("resilience.on_nonfinite=skip", suffered=[{"kind": "nan", "iteration": 3}])
    assert [m[0] for m in run.metrics()] == [1, 2, 4, 5, 6]
    (event,) = read_events(run.logs / "events.jsonl")
    assert event.pop("data") == read_steps(run.logs / "metrics.jsonl")[0].data
    assert event == {
        "iteration": 3,
        "event": "skipped",
        "reason": "the loss is nan",
        "loss": None,
        "first_pack": 8,
        "packs": 4,
    }
    assert read_train_state(run.root).consumed_packs == 24, "its packs are not read again"


def test_a_nan_stops_by_default_and_without_end(run):
    with pytest.raises(AgreedError, match="iteration 2: the loss is nan; stopped"):
        run(suffered=[{"kind": "nan", "iteration": 2}])
    (event,) = read_events(run.logs / "events.jsonl")
    assert (event["event"], event["iteration"], event["first_pack"]) == ("stopped", 2, 4)
    settings = ["resilience.on_nonfinite=skip", "resilience.max_consecutive_skips=2"]
    with pytest.raises(AgreedError, match="iteration 4: the loss is nan, after 2 skipped steps in a row"):
        run(*settings, suffered=[{"kind": "nan", "iteration": i} for i in (2, 3, 4, 5)])


def test_a_spike_is_judged_the_same_after_a_resume(run):
    """The losses it is measured against travel with the checkpoint."""
    settings = ["resilience.on_spike=skip", "resilience.spike_window=3"]
    spike = [{"kind": "spike", "iteration": 5}]
    run(*settings, suffered=spike)
    whole, events = run.metrics(), read_events(run.logs / "events.jsonl")
    assert [m[0] for m in whole] == [1, 2, 3, 4, 6]
    assert re.match(r"the loss [\d.]+ is above 2 times the recent [\d.]+", events[0]["reason"])
    shutil.rmtree(run.root)
    run(*settings, "training.stop_at_iteration=4", suffered=spike)
    run(*settings, suffered=spike)
    resumed, *found = read_events(run.logs / "events.jsonl")
    assert run.metrics() == whole and found == events and resumed["event"] == "resumed"


def test_the_guard_needs_its_window_full():
    guard = LossGuard(ResilienceConfig(on_spike="stop", spike_window=2))
    for loss in (1.0, 50.0):
        assert guard.judge("loss", loss) == ("go", "")
        guard.accept(loss)
    assert guard.judge("loss", 52.0)[0] == "stop" and guard.judge("loss", 51.0)[0] == "go"
    assert guard.judge("gradient norm", 1e9)[0] == "go"
    assert guard.judge("gradient norm", float("inf")) == ("stop", "the gradient norm is inf")
    with pytest.raises(ValueError, match="spike_factor is 1: must lie between 1.01 and"):
        ResilienceConfig(spike_factor=1)


def test_a_stalled_rank_is_named_with_its_step(run):
    stall = [{"kind": "stall", "rank": 1, "iteration": 2, "seconds": 4}]
    settings = ["resilience.heartbeat_seconds=0.2", "resilience.hang_minutes=0.025"]
    settings += ["training.stop_at_iteration=3", "parallel.context_parallel_size=2"]
    launch(train_faulty, 2, run.config, 2, settings, stall)
    report = (run.logs / "hang.txt").read_text()
    assert report.startswith("behind the others: rank 1 on ") and "in iteration 2, data, for" in report
    assert "the furthest is rank 0 in iteration 2, forward and backward" in report
    assert "before_step" in (run.logs / "heartbeat" / "rank_00001.stack").read_text()
    assert [(b.rank, b.phase) for b in read_beats(run.logs)] == [(0, "ended"), (1, "ended")]
    assert len(run.metrics()) == 3, "the run went on"


def train_noted(config: str, outcome: str) -> None:
    """On each rank: train, with a file for what becomes of it."""
    observe = partial(standard_observers, outcome=Path(outcome))
    settings = ["checkpoint.save_interval=2", "parallel.context_parallel_size=2"]
    train(load_run_config(config, settings, world_size=2), open_loader=SyntheticLoader, observe=observe)


def test_what_becomes_of_a_run_is_noted_by_one_rank(run, tmp_path):
    for _ in range(2):
        launch(train_noted, 2, run.config, str(tmp_path / "outcome"))
    lines = (tmp_path / "outcome").read_text().splitlines()
    folder = load_run_config(run.config).checkpoint.path
    assert lines == [f"started 0 {folder}", "saved 2", "saved 4", "saved 6", f"started 6 {folder}"]


def test_a_run_that_cannot_save_stops(run):
    """Not after one failure, and those in a row are counted."""
    settings = ["checkpoint.save_interval=1", "checkpoint.max_failed_saves=2"]
    failed = [{"kind": "failed_save", "iteration": i} for i in (1, 3, 4, 5)]
    with pytest.raises(AgreedError, match=r"2 saves in a row have failed .* iteration 2 is saved: make room"):
        run(*settings, suffered=failed)
    assert len(run.metrics()) == 4 and read_train_state(run.root).iteration == 2
    told = [(event["iteration"], event["event"]) for event in read_events(run.logs / "events.jsonl")]
    assert told == [(i, "failed_save") for i in (1, 3, 4)]


def test_every_start_but_the_first_is_an_event(run, monkeypatch):
    """With what it repeats; the step that ended a start has a line only in the next one."""
    settings, broken = ["checkpoint.save_interval=2"], [{"kind": "nan", "iteration": 4}]
    with pytest.raises(AgreedError):
        run(*settings, suffered=broken)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(*settings, "training.stop_at_iteration=5")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    run(*settings)
    run(*settings)  # nothing is left to do
    names = ("iteration", "event", "processes", "repeated", "job", "requeues", "restarts")
    told = [tuple(event[name] for name in names) for event in read_events(run.logs / "events.jsonl")]
    assert told == [(2, "resumed", 1, 1, "", 0, 1), (5, "resumed", 1, 0, "/7", 3, 1)]


def test_a_run_whose_checkpoints_do_not_fit_is_refused_before_its_first_step(run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(AgreedError, match="0.000 GB are free, too few .* 1 of 0.00. GB"):
        run()
    assert not run.metrics() and not has_checkpoint(run.root)
    run("checkpoint.check_space=false")
    assert len(run.metrics()) == 6
    run()  # nothing is left to do, nor to save


def start_alone(config: str, port: int) -> None:
    """The first of two ranks, whose second does not come."""
    meeting = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = ["resilience.hang_minutes=0.01", "resilience.abort_on_hang=true"]
    with patch.dict(os.environ, meeting):
        train_stages(load_stages(config, settings))


@pytest.mark.parametrize("again", [False, True])
def test_a_rank_that_waits_for_the_others_to_start_is_named_and_ends(run, again, capfd):
    """Before any of the run is there; torch would wait for half an hour. What is written is written where the
    run has been before."""
    if again:
        run.logs.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = multiprocessing.get_context("fork").Process(target=start_alone, args=(run.config, port))
    process.start()
    process.join(60)
    assert process.exitcode == EXIT_HANG
    assert "in iteration 0, starting, for" in capfd.readouterr().err
    if not again:
        assert not run.root.exists()
        return
    assert "in iteration 0, starting, for" in (run.logs / "hang.txt").read_text()
    assert "process_group" in (run.logs / "heartbeat" / "rank_00000.stack").read_text()


def test_who_keeps_the_others_waiting(tmp_path):
    now = time.time()

    def beat(rank: int, iteration: int, phase: str, age: float = 0.0, host: str = "node") -> Beat:
        return Beat(rank, host, 7, iteration, phase, now - 60, now, age=age)

    together = [beat(0, 4, "save"), beat(1, 4, "save")]
    assert describe_beats(together).startswith("all in the same phase")
    stopped = [beat(0, 4, "optimizer"), beat(1, 4, "optimizer", age=100)]
    said = describe_beats(stopped)
    assert said.startswith("silent (process gone or stopped): rank 1 on node (pid 7) in iter")
    assert ", for 160 s;" in said
    rarely = [replace(together[0], interval=60.0, age=100.0)]
    assert describe_beats(rarely).startswith("all in the same phase"), "it writes once a minute"

    def hosts(*unreachable: int, n: int = 3) -> str:
        return describe_beats(
            [replace(beat(r, 4, "save", host=f"n{r}"), reaches=r not in unreachable) for r in range(n)]
        )

    assert hosts(1).startswith("host n1 is cut off from the others: rank 1 on n1 (pid 7) in iteration 4")
    assert hosts(1, 2).startswith("host n0 is cut off from the others: rank 0 on n0")
    assert hosts(1, n=2).startswith("hosts n0 and n1 do not reach each other: rank 1 on n1")
    with pytest.raises(UserError, match="no heartbeat of a run here"):
        read_beats(tmp_path)


@pytest.mark.parametrize("skew", [60, -60, 3600])
def test_clocks_of_nodes_differ(tmp_path, monkeypatch, skew):
    """The file system's time counts: a clock that is wrong makes nobody silent, nor a silent one alive."""
    true_time = time.time
    for rank in range(2):
        monkeypatch.setattr(time, "time", lambda: true_time() + (skew if rank else 0))  # noqa: B023
        with Heartbeat(tmp_path, rank, seconds=1, hang_seconds=60, abort=False) as heart:
            heart.phase(4, "save")
        file = tmp_path / "heartbeat" / f"rank_{rank:05d}.json"
        file.write_text(file.read_text().replace('"ended"', '"save"'))  # its thread has ended, and it not
    for judge in (0, skew):
        monkeypatch.setattr(time, "time", lambda: true_time() + judge)  # noqa: B023
        assert describe_beats(read_beats(tmp_path)).startswith("all in the same phase")
        assert all(0 <= beat.standing < 50 for beat in read_beats(tmp_path))
    os.utime(tmp_path / "heartbeat" / "rank_00000.json", (true_time() - 30,) * 2)
    assert describe_beats(read_beats(tmp_path)).startswith("silent (process gone or stopped): rank 0 ")


def unanswered(*_, timeout: float):
    """A connection over a link that is cut."""
    time.sleep(timeout)
    raise TimeoutError


def test_a_host_without_the_others_is_known(monkeypatch):
    """By the place where the ranks met; a port that nobody listens at is an answer of its host."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(heartbeat, "_REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = ("127.0.0.1", server.getsockname()[1])
        for name, value in zip(("MASTER_ADDR", "MASTER_PORT"), place, strict=True):
            monkeypatch.setenv(name, str(value))
        assert heartbeat._reaches_the_others()
    assert heartbeat._reaches_the_others()
    with monkeypatch.context() as cut:
        cut.setattr(socket, "create_connection", unanswered)
        assert not heartbeat._reaches_the_others()
    monkeypatch.delenv("MASTER_ADDR")
    assert heartbeat._reaches_the_others(), "nothing is known"


def test_a_run_that_goes_on_and_ends_does_not_wait_for_the_report_of_its_hang(tmp_path):
    """Which waits until every rank has written, however rarely that was asked for; nor is it aborted."""
    started = time.time()
    with Heartbeat(tmp_path, 0, seconds=3600, hang_seconds=0.4, abort=True):
        time.sleep(0.55)
    assert time.time() - started < 5
    assert (tmp_path / "heartbeat" / "rank_00000.stack").exists(), "it hung"
    with pytest.raises(ValueError, match="abort_on_hang needs the heartbeat"):
        ResilienceConfig(abort_on_hang=True, heartbeat_seconds=0)


def test_no_heartbeat_is_written_when_it_is_off(tmp_path):
    with Heartbeat(tmp_path, 0, seconds=0, hang_seconds=1, abort=False) as heart:
        heart.phase(1, "data")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_job_goes_on_bit_for_bit(run, tmp_path):
    """Killed at two places, with a slow disk: what it logged in the end is what a clean run logs."""
    save = "checkpoint.save_interval=2"
    run(save)
    clean = run.metrics()
    shutil.rmtree(run.root)
    suffered = [
        *({"kind": "kill", "iteration": i, "once": str(tmp_path / f"killed_{i}")} for i in (3, 6)),
        {"kind": "slow_save", "seconds": 0.1},
    ]
    deaths = 0
    while True:
        try:
            launch(train_faulty, 1, run.config, 1, [save], suffered)
            break
        except RuntimeError as error:
            assert "ended without a result" in str(error)
            deaths += 1
    assert deaths == 2 and run.metrics() == clean
    assert Path(run.root, "iter_0000006").is_dir()


class WeighedLoader(SyntheticLoader):
    """Writes down the memory of the process before each global batch."""

    def step(self, consumed_packs):
        resident = psutil.Process().memory_info().rss
        with open(os.environ["SOAK_MEMORY"], "a") as file:
            file.write(f"{os.getpid()} {resident}\n")
        return super().step(consumed_packs)


class FaultyDisk:
    """Writes slowly. Once, the save of an iteration in `full` finds no space, of one in `deadly` kills."""

    def __init__(self, marks: str, full: list[int], deadly: list[int]) -> None:
        self._marks, self._full, self._deadly = Path(marks), full, deadly
        self._write = saving.write_pieces

    def __call__(self, file, pieces):
        time.sleep(0.05)
        iteration = int(file.parent.name[6:13])  # .iter_0000025.saving
        if self._first(self._full, "full", iteration):
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._first(self._deadly, "deadly", iteration):
            self._write(file, pieces[:20])
            os._exit(137)
        return self._write(file, pieces)

    def _first(self, iterations: list[int], kind: str, iteration: int) -> bool:
        mark = self._marks / f"{kind}_{iteration}"
        if iteration not in iterations or mark.exists():
            return False
        mark.touch()
        return True


def train_soaking(config: str, overrides: list[str], suffered: list[dict], marks: str, disk: dict) -> None:
    environment = {faults.VARIABLE: json.dumps(suffered), "SOAK_MEMORY": f"{marks}/memory"}
    with (
        patch.dict(os.environ, environment),
        patch.object(saving, "write_pieces", FaultyDisk(marks, **disk)),
    ):
        train(load_run_config(config, overrides, world_size=1), open_loader=WeighedLoader)


@pytest.mark.slow
@pytest.mark.soak
def test_soak(run, tmp_path):
    """500 steps with kills, also in the middle of saves, stalls, a full and a slow disk at random places: bit
    for bit, memory flat. Media fail in both runs."""
    settings = ["training.train_iterations=500", "checkpoint.save_interval=25", "checkpoint.keep_last=2"]
    settings += ["checkpoint.async_save=true", "data.on_media_error=skip", "checkpoint.max_failed_saves=9"]
    lost = ((20, [1]), (21, [0, 1, 2, 3]), (300, [2, 3]))
    bad_media = [{"kind": "bad_media", "iteration": i, "samples": samples} for i, samples in lost]
    marks, no_faults = str(tmp_path), {"full": [], "deadly": []}
    launch(train_soaking, 1, run.config, settings, bad_media, marks, no_faults, timeout=900)
    clean, kept = run.metrics(), contents(checkpoint_folder(run.root))
    resident = [int(line.split()[1]) for line in (tmp_path / "memory").read_text().splitlines()]
    print(f"resident MB: {[r // 10**6 for r in resident[::50]]}")
    assert len(resident) == 500 and max(resident[-50:]) < 1.05 * max(resident[50:100])
    shutil.rmtree(run.root)

    random = Random(5)
    once = [{"once": str(tmp_path / f"fault_{i}")} for i in range(12)]
    suffered = [{"kind": "kill", "iteration": random.randint(2, 500), **once[i]} for i in range(8)]
    suffered += [
        *(
            {"kind": "stall", "iteration": random.randint(2, 500), "seconds": 1, **once[8 + i]}
            for i in range(2)
        ),
        *({"kind": "failed_save", "iteration": 25 * random.randint(1, 19), **once[10 + i]} for i in range(2)),
        *bad_media,
    ]
    saves = [25 * i for i in random.sample(range(1, 20), 6)]
    disk = {"full": saves[:3], "deadly": saves[3:]}
    deaths = 0
    while True:
        try:
            launch(train_soaking, 1, run.config, settings, suffered, marks, disk, timeout=900)
            break
        except RuntimeError as error:
            assert "ended without a result" in str(error)
            deaths += 1
    assert deaths == 8 + 3 and all(Path(fault["once"]).exists() for fault in once)
    assert all((tmp_path / f"{kind}_{i}").exists() for kind, iterations in disk.items() for i in iterations)
    assert run.metrics() == clean
    tensors = {name for name in kept if name.endswith(".distcp")}
    found = contents(checkpoint_folder(run.root))
    assert tensors and all(found[name] == kept[name] for name in tensors)
    assert len(list(run.root.glob("iter_*"))) == 2

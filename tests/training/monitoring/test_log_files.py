"""A run's logs on a resume and on a disk that fills up: nothing torn, nothing lost, training goes on."""

import resource
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eagle.errors import UserError, run_cli
from megatron_eagle.files import AppendedFile, append_line, read_records, to_line, write_whole
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.heartbeat import Heartbeat, read_beats, status
from megatron_eagle.training.monitoring.log_files import drop_repeated
from megatron_eagle.training.monitoring.metrics import StepMetrics, read_events, read_metrics
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.monitoring.run_log import LoggingConfig, RunLog, WandbConfig
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import standard_observers, train
from tests.full_disk import full_disk
from tests.parallel.harness import launch
from tests.training.synthetic_data import SyntheticLoader
from tests.training.test_training_loop import write_run

QUIET = LoggingConfig(progress=False)
START = {"active": True, "iteration": 0, "last_iteration": 9}


def step(iteration: int) -> StepMetrics:
    return StepMetrics(iteration, 1.0 / iteration, 1.0, 0.1, 8, 1.0, 0.1)


def losses_on_board(folder: Path) -> list[tuple[int, float]]:
    scalars = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    return [(event.step, event.value) for event in scalars]


def test_only_repeated_and_cut_off_lines_go(tmp_path, capsys):
    """Lines of other versions, and damaged ones in the middle, stay byte for byte."""
    file = tmp_path / "metrics.jsonl"
    lines = [
        to_line(asdict(step(1)) | {"of_a_later_version": [1]}),
        b'{"iteration": 2, "kind of a later version": {"loss": 1}}\n',
        b'{"no iteration":   true}\n',
        b'{"iteration": 2, "lo\x00\xff\n',
        to_line(asdict(step(2))),
        to_line(asdict(step(3))),
    ]
    file.write_bytes(b"".join(lines) + b'{"iteration": 2, "lo')
    assert [m.iteration for m in read_metrics(file)] == [1, 2, 3]
    assert drop_repeated(file, 2) == (1, 1)
    assert file.read_bytes() == b"".join(lines[:5])
    assert drop_repeated(file, 9) == (0, 1) and file.read_bytes() == b"".join(lines[:5])
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(lines[3])  # the last line, but not cut
    assert drop_repeated(damaged, 9) == (0, 1) and damaged.read_bytes() == lines[3]
    log = RunLog(QUIET, tmp_path, **START)
    with full_disk(), pytest.raises(UserError, match="File too large; nothing of them is lost"), log:
        pass
    assert file.read_bytes() == b"".join(lines[:5]) and not list(tmp_path.glob(".*"))
    with RunLog(QUIET, tmp_path, active=True, iteration=2, last_iteration=9):
        pass
    assert f"warning: {file}: 1 lines are damaged; they are kept" in capsys.readouterr().err


def test_a_disk_that_is_full_for_a_while(tmp_path, capsys):
    """What could not be written is, in order, as soon as there is room; two lines say so, not one a step."""
    with RunLog(QUIET, tmp_path, **START) as log:
        log.step(step(1))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with full_disk(size + 10) as printed:  # the next line fits in part
            for iteration in (2, 3):
                log.step(step(iteration))
                log.event(iteration, "skipped", "x" * size)
        said = printed.getvalue()
        assert (
            said.count("metrics.jsonl cannot be written: File too large; training goes on, and what is") == 1
        )
        assert said.count("events.jsonl cannot be written") == 1
        assert said.count("TensorBoard cannot be written") == 1
        log.step(step(4))
        assert capsys.readouterr().err.count("metrics.jsonl is written again, with what was missing") == 1
    assert [m.iteration for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 4, "nothing half-written"
    assert [e["iteration"] for e in read_events(tmp_path / "events.jsonl")] == [2, 3]
    assert [iteration for iteration, _ in losses_on_board(tmp_path)] == [1, 2, 3, 4]


def test_a_disk_that_is_full_to_the_end(tmp_path):
    config = LoggingConfig(progress=False, tensorboard=False)
    with full_disk(60) as printed, RunLog(config, tmp_path, **START) as log:  # a line is longer
        for iteration in (1, 2):
            log.step(step(iteration))
    assert "metrics.jsonl ends without the last 2 records of this run" in printed.getvalue()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("what", [{"tensorboard": True}, {"wandb": WandbConfig("eagle", mode="offline")}])
def test_the_first_start_on_a_full_disk(tmp_path, wandb, what):
    """There is room for names, and not for TensorBoard's head or W&B's id."""
    config = LoggingConfig(**{"progress": False, "tensorboard": False, **what})
    refused = pytest.raises(UserError, match="cannot write the logs here: File too large")
    with full_disk(), refused, RunLog(config, tmp_path, **START):
        pass
    assert not (tmp_path / "wandb_run.txt").exists()
    with RunLog(config, tmp_path, **START) as log:
        log.step(step(1))
    assert [m.iteration for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_heartbeats_of_a_later_version_are_read(tmp_path):
    with Heartbeat(tmp_path, 3, seconds=60, hang_seconds=60, abort=False) as heart:
        heart.phase(2, "data")
    (beat,) = read_beats(tmp_path)
    file = tmp_path / "heartbeat" / "rank_00003.json"
    file.write_bytes(to_line(asdict(beat) | {"temperature": 71}))
    (tmp_path / "heartbeat" / "rank_00004.json").write_bytes(b"")  # power was lost
    assert read_beats(tmp_path) == [beat] and "rank     3" in status(tmp_path)


def test_curves_end_where_a_resume_begins(tmp_path):
    with RunLog(QUIET, tmp_path, **START) as log:
        for iteration in (1, 2, 3):
            log.step(step(iteration))
    with RunLog(QUIET, tmp_path, active=True, iteration=1, last_iteration=9) as log:
        log.step(StepMetrics(2, 9.0, 1.0, 0.1, 8, 1.0, 0.1))
    assert losses_on_board(tmp_path) == [(1, 1.0), (2, 9.0)]


def test_appended_files(tmp_path):
    file = AppendedFile(tmp_path / "a")
    file.write(b"one\n")
    with full_disk(6), pytest.raises(OSError, match="File too large") as refused:
        file.write(b"three\n")
    assert refused.value.filename == str(tmp_path / "a")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"one\n", "what fitted is taken back"
    # Where several processes append, one that found no space spoils no other's line.
    (tmp_path / "b").write_bytes(b'{"n": 1}\n{"n": ')
    append_line(tmp_path / "b", {"n": 2, "name": "\udce4"})
    append_line(tmp_path / "b", {"n": 3})
    assert read_records(tmp_path / "b") == [{"n": 1}, {"n": 2, "name": "\udce4"}, {"n": 3}]
    with full_disk((tmp_path / "b").stat().st_size + 3), pytest.raises(OSError, match="No space left"):
        append_line(tmp_path / "b", {"n": 4})
    append_line(tmp_path / "b", {"n": 5})
    assert [record["n"] for record in read_records(tmp_path / "b")] == [1, 2, 3, 5]


def test_a_tool_on_a_full_disk_says_one_line(tmp_path, capsys):
    def main():
        with full_disk():
            write_whole(tmp_path / "scores.json", "{}")

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'scores.json'}: File too large; make room and start again\n"
    )


def test_a_hang_is_named_on_a_full_disk(tmp_path):
    with Heartbeat(tmp_path, 0, seconds=0.01, hang_seconds=60, abort=False) as heart:
        heart.phase(2, "data")
        time.sleep(0.03)
    with full_disk() as printed, Heartbeat(tmp_path, 0, seconds=0.01, hang_seconds=0.04, abort=False):
        time.sleep(0.12)
    assert "hang: " in printed.getvalue() and not (tmp_path / "hang.txt").exists()


class FillingLoader(SyntheticLoader):
    """The disk of every rank is full during the second and the third iteration."""

    def step(self, consumed_packs):
        if consumed_packs in (4, 12):
            limit = 0 if consumed_packs == 4 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return super().step(consumed_packs)


class FullDisk(Observer):
    """The disk is full from where this is opened."""

    def __enter__(self):
        self._disk = full_disk()
        self._disk.__enter__()
        return self

    def __exit__(self, *exception):
        self._disk.__exit__(*exception)


def train_on_a_full_disk(config: str) -> str:
    """Four iterations, and a resume that finds the disk full: what it says."""
    overrides = ["training.stop_at_iteration=4", "logging.tensorboard=true", "checkpoint.save_interval=2"]
    train(load_run_config(config, overrides, world_size=2), open_loader=FillingLoader)

    def observe(run):
        log, *others = standard_observers(run)
        return [FullDisk(), log, *others]

    try:
        train(load_run_config(config, world_size=2), open_loader=SyntheticLoader, observe=observe)
    except AgreedError as error:
        return str(error)
    return ""


def test_training_on_a_full_disk(tmp_path):
    write_run(tmp_path)
    said = launch(train_on_a_full_disk, 2, str(tmp_path / "run.yaml"))
    logs = tmp_path / "run" / "logs"
    assert said == [f"{logs}: cannot write the logs here: File too large; nothing of them is lost"] * 2
    assert [m.iteration for m in read_metrics(logs / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [iteration for iteration, _ in losses_on_board(logs)] == [1, 2, 3, 4]
    saved = [folder.name for folder in (tmp_path / "run").glob("iter_*")]
    assert saved == ["iter_0000004"], "the save of iteration 2 found no space, that of 4 did"

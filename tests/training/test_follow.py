"""Training beside preprocessing: the run that followed is the run on the complete store, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_eagle.checkpoint import read_train_state
from megatron_eagle.commands import plan as plan_command
from megatron_eagle.commands import preview as preview_command
from megatron_eagle.commands import train as train_command
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.store.shards import last_head
from megatron_eagle.data.store.signs import SignOfLife, growing_folder
from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.heartbeat import read_beats
from megatron_eagle.training.replay.replay import prepare
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.data.helpers import conversation, make_image, make_tokenizer, write_jsonl
from tests.data.killed import settings
from tests.parallel.harness import launch
from tests.paths import REPO

LENGTH, ROWS, LINES = 100, 4, 40
FOLLOW = {"shards_per_window": 2, "dead_after_minutes": 5}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A recipe of text and pictures, some of them broken; its store, complete; a run on `DATA`."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = make_tokenizer(folder / "tokenizer")
    make_image(folder / "a.png", (40, 30))
    text = [conversation(f"Hi {k}", "Yes " * (k % 9 + 1)) for k in range(LINES)]
    pictures = [conversation("<image>?", f"A cat {k}.", image="a.png") for k in range(LINES // 4)]
    write_jsonl(folder / "text.jsonl", text)
    write_jsonl(folder / "pictures.jsonl", ["{broken", *pictures])
    recipe = {
        "text": {"annotation": "text.jsonl"},
        "pictures": {"annotation": "pictures.jsonl", "repeat_time": 2},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    preprocess(folder / "recipe.json", folder / "store", settings(str(tokenizer)), Execution(1), follow=ROWS)
    return folder


def write_run(made: Path, folder: Path, store: Path, **sections) -> Path:
    values = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(store), "length": LENGTH, "follow": FOLLOW},
        "training": {"train_iterations": 9, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"path": str(folder / "run")},
        "resilience": {"heartbeat_seconds": 0.2},
        "logging": {"progress": False, "tensorboard": False},
    }
    values["model"]["text"] = {"num_hidden_layers": 2}
    for name, section in sections.items():
        values[name] |= section
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


class Preprocessing:
    """The real thing in a process of its own; it goes on as far as `let` says."""

    def __init__(self, made: Path, output: Path):
        self.gate, self.output = output.with_name("gate"), output
        self.let(0)
        arguments = map(str, (made / "recipe.json", output, made / "tokenizer", ROWS, self.gate))
        command = [sys.executable, "-m", "tests.data.paced", *arguments]
        self._start = lambda: subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL)
        self.process = self._start()
        wait_for(lambda: (growing_folder(output) / "manifest.json").exists())

    def let(self, lines: int) -> None:
        """Lines of this process' life."""
        self.gate.write_text(str(lines))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def start_again(self) -> None:
        self.process = self._start()

    @property
    def shards(self) -> int:
        return last_head(growing_folder(self.output) / str(LENGTH)).number + 1

    def close(self) -> None:
        self.let(10**6)
        assert self.process.wait(60) == 0


def wait_for(condition, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def waits(run: Path, ranks: int = 2) -> bool:
    """Whether all ranks wait for data."""
    try:
        beats = read_beats(run / "logs")
    except UserError:
        return False
    return len(beats) == ranks and all(beat.phase == "waiting for data" for beat in beats)


def run_steps(file: str, n: int, *overrides: str) -> None:
    """On each of n ranks."""
    train(load_run_config(file, overrides, world_size=n))


def on_ranks(file: Path, n: int, *overrides: str) -> None:
    launch(run_steps, n, str(file), n, *overrides)


def steps(run: Path) -> list[dict]:
    """Iteration, loss and everything about the data of each step."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["data"].pop("path")
    names = ("iteration", "loss", "grad_norm", "samples", "tokens_by_dataset", "first_pack", "data")
    return [{name: line[name] for name in names} for line in lines]


@pytest.fixture(scope="module")
def finished(made) -> Path:
    """The run on the complete store: four steps on two ranks, the others on one."""
    file = write_run(made, made / "finished", made / "store")
    on_ranks(file, 2, "training.stop_at_iteration=4")
    on_ranks(file, 1)
    return made / "finished" / "run"


def test_side_by_side(made, finished, tmp_path):
    """Preprocessing is killed and started again while training waits; training goes on with other ranks."""
    preprocessing = Preprocessing(made, tmp_path / "store")
    file, run = write_run(made, tmp_path, tmp_path / "store"), tmp_path / "run"

    def pace() -> None:
        wait_for(lambda: waits(run))
        preprocessing.let(12)
        wait_for(lambda: preprocessing.shards >= 2)
        wait_for(lambda: waits(run))
        preprocessing.kill()
        preprocessing.let(0)
        preprocessing.start_again()
        preprocessing.let(17)

    pacing = threading.Thread(target=pace, daemon=True)
    pacing.start()
    on_ranks(file, 2, "training.stop_at_iteration=4")
    pacing.join()
    assert not (tmp_path / "store").exists(), "preprocessing has not ended"
    threading.Timer(3, preprocessing.let, [10**6]).start()
    on_ranks(file, 1)
    preprocessing.close()
    assert steps(run) == steps(finished)
    events = [json.loads(line) for line in (run / "logs" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("waited") >= 2
    assert all(event["seconds"] >= 0 for event in events if event["event"] == "waited")
    assert (tmp_path / "store" / "manifest.json").exists()


def test_a_replay_finds_the_batch(finished):
    """Also that of a late step, without packing what came before; the control is another store's."""
    last = steps(finished)[-1]
    found = prepare(finished, last["iteration"])
    assert len(found.samples) == last["samples"]
    with pytest.raises(UserError, match="without preprocess run --follow|no token store"):
        prepare(finished, 9, overrides=["data.path=" + str(finished)])


def test_a_resumed_run_reads_what_it_has_read(made, finished, tmp_path):
    """The state knows it: another window size, or a run without windows, is refused."""
    state = read_train_state(finished)
    assert state.read is not None and state.read.first_pack + state.read.packs == state.consumed_packs == 36
    file = write_run(made, made / "finished", made / "store", training={"train_iterations": 10})
    write_packs(made / "store", LENGTH, seed=0)  # for a run that does not follow
    for override, message in (
        ("data.follow.shards_per_window=3", "shards_per_window 2 there, 3 here"),
        ("data.seed=1", "seed 0 there, 1 here"),
        ("data.follow=null", "has read its data with data.follow, and goes on so"),
    ):
        with pytest.raises(UserError, match=message):
            run_steps(str(file), 1, override)
    file = write_run(made, tmp_path, made / "store")
    run_steps(str(file), 1, "data.follow=null", "training.stop_at_iteration=1")
    with pytest.raises(UserError, match="has read its data without data.follow, and goes on so"):
        run_steps(str(file), 1)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context"])
def test_ranks_of_one_replica_read_the_same(made, finished, tmp_path, axis):
    file = write_run(made, tmp_path, made / "store")
    layout = [f"parallel.{axis}_{'' if axis == 'context' else 'model_'}parallel_size=2"]
    if axis == "context":
        layout.append("parallel.context_parallel_layout=contiguous")
    on_ranks(file, 2, *layout, "training.stop_at_iteration=4")
    found, expected = steps(tmp_path / "run"), steps(finished)[:4]
    for name in ("iteration", "samples", "tokens_by_dataset", "first_pack", "data"):
        assert [step[name] for step in found] == [step[name] for step in expected]
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=1e-4)


def test_preprocessing_that_died_is_told_from_a_slow_one(made, tmp_path):
    preprocessing = Preprocessing(made, tmp_path / "store")
    preprocessing.kill()
    file = write_run(made, tmp_path, tmp_path / "store")
    with pytest.raises(
        UserError, match="window 1 of .* no sign of life .*start the same preprocess"
    ) as error:
        run_steps(str(file), 1, "data.follow.dead_after_minutes=0.02")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_preprocessing_that_is_slow_is_waited_for(made, tmp_path):
    """The control: a sign of life, and no line for longer than that."""
    Preprocessing(made, tmp_path / "store").kill()
    file = write_run(made, tmp_path, tmp_path / "store")
    end = threading.Event()

    def slow() -> None:
        with SignOfLife(tmp_path / "store", seconds=0.2):
            end.wait()

    sign = threading.Thread(target=slow)
    sign.start()
    stop = threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    with pytest.raises(Exception, match="stopped by a signal while it waited for data, after iteration 0"):
        run_steps(str(file), 1, "data.follow.dead_after_minutes=0.02")
    end.set()
    sign.join()


def test_commands_on_a_store_that_is_made(made, tmp_path, capsys):
    preprocessing = Preprocessing(made, tmp_path / "store")
    file, store = write_run(made, tmp_path, tmp_path / "store"), str(tmp_path / "store")
    check = ["check", "--config", str(file), "--processes", "1"]
    plan = ["--config", str(file), "--gpus", "1", "--gpu", "h100"]
    assert train_command.main(check) == 0
    assert "0 of 16 shards are there; the run would wait for window 1 of 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="not known before there is window 1 of 8"):
        plan_command.main(plan)
    preprocessing.let(20)
    wait_for(lambda: preprocessing.shards >= 2)
    assert train_command.main(check) == 0
    plan_command.main(plan)
    preview_command.main(["mix", store, "--length", str(LENGTH)])
    shown = capsys.readouterr()
    assert "epochs, judged by its first window" in shown.out and "pictures" in shown.out
    assert "is being made" in shown.err
    preview_command.main(["show", store, "--length", str(LENGTH), "--sample", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["source"]["line"] == 2
    with pytest.raises(UserError, match="is not complete yet: .*or train with data.follow"):
        load_run_config(file, ["data.follow="], world_size=1)
    preprocessing.close()


class Torchrun:
    """`train run` on two processes, as a user starts it."""

    def __init__(self, file: Path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "megatron_eagle", "train", "run", "--config", str(file)]
        self.log = (file.parent / "log").open("ab+")
        self.process = subprocess.Popen(command, cwd=REPO, stderr=self.log, start_new_session=True)

    def ranks(self) -> list[psutil.Process]:
        return [
            p for p in psutil.Process(self.process.pid).children(recursive=True) if "train" in p.cmdline()
        ]

    def kill(self) -> None:
        """The ranks too: torchrun gives each a session of its own, and they would write on into the run."""
        ranks = self.ranks()
        os.killpg(self.process.pid, signal.SIGKILL)
        for rank in ranks:
            rank.kill()
        self.process.wait()


@pytest.mark.slow
def test_stopped_and_killed_while_it_waits(made, finished, tmp_path):
    """A stop signal saves what was trained; a kill loses what came after the last checkpoint."""
    preprocessing = Preprocessing(made, tmp_path / "store")
    file = write_run(made, tmp_path, tmp_path / "store", checkpoint={"save_interval": 3})
    run = tmp_path / "run"
    preprocessing.let(10)
    training = Torchrun(file)
    wait_for(lambda: waits(run) and (run / "logs" / "metrics.jsonl").stat().st_size, 120)
    for rank in training.ranks():
        rank.send_signal(signal.SIGTERM)
    training.process.wait(60)
    stopped = read_train_state(run).iteration
    assert 0 < stopped == len(steps(run)) and "while it waited for data" in (tmp_path / "log").read_text()

    training = Torchrun(file)
    wait_for(lambda: waits(run), 120)
    preprocessing.let(22)
    wait_for(lambda: len(steps(run)) > stopped, 120)
    wait_for(lambda: waits(run), 120)
    training.kill()
    preprocessing.let(10**6)
    on_ranks(file, 1)
    preprocessing.close()
    for ours, theirs in zip(steps(run), steps(finished), strict=True):
        assert {name: ours[name] for name in ("data", "samples", "first_pack", "tokens_by_dataset")} == {
            name: theirs[name] for name in ("data", "samples", "first_pack", "tokens_by_dataset")
        }
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4

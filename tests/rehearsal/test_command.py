"""`train rehearse`: what it prints for a small job, and one line for what cannot be rehearsed."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_eagle.commands.train import main
from megatron_eagle.errors import UserError
from megatron_eagle.rehearsal import shim
from tests.parallel.real_runs import write_mixture, write_run

VALUES = {
    "model": {"preset": "tiny", "text": {"vocab_size": 504}},
    "data": {"path": "nowhere", "length": 256},
    "training": {"train_iterations": 10, "global_batch_size": 4},
    "checkpoint": {"path": "nowhere"},
    "parallel": {"context_parallel_size": 2},
}
PIPELINE = "{pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}"


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    return str(file)


def test_a_small_job(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    words = ["--gpus", "4", "--gpu", "h200", "--ranks", "0,3,3", "--timeline", str(trace)]
    words.append("data.follow={shards_per_window: 1}")  # of data that are not there
    assert main(["rehearse", "--config", config, *words]) == 0
    printed = capsys.readouterr().out
    assert "4 x NVIDIA H200" in printed
    assert "all 4 ranks' collectives and messages meet their other ends" in printed
    assert "the host waits for the device 0 times a microbatch" in printed
    assert "0 problems\npredicted: a step of 2 microbatches takes" in printed
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 3}
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "context parallel"} <= lanes
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"mm", "_flash_attention_forward", "_flash_attention_backward", "forward_kernel"} <= names
    phases = {event["args"]["phase"] for event in events if event["ph"] == "X"}
    assert phases == {"data", "forward and backward", "optimizer"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h1000"], "--gpu h1000: not a GPU that can be rehearsed: choose a100, "),
        (["--gpus", "3"], "3 processes cannot hold"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--ranks", "0,4"], "there is no rank 4: the job has 4"),
        (["--ranks", "all"], "expected numbers"),
        (["--timeline", "/nowhere/step.json"], "--timeline /nowhere/step.json: there is no such folder"),
        (["--timeline", "/"], "--timeline /: is a folder"),
        (
            ["--timeline", "step.json", "layers.attention=flash4"],
            "flash4: no speed is known for it on NVIDIA H100",
        ),
        (["--microbatches", "3"], "--microbatches is 3: a step of this run has 2"),
        (
            ["--microbatches", "1", f"parallel={PIPELINE}"],
            "--microbatches is 1: with virtual pipeline stages it must be a multiple of 2",
        ),
        (["--packs", "data"], "nowhere"),
        (["--packs", "data", "--preset", "tiny"], "--preset is for made-up packs"),
        (["--stage", "one"], "it has no stages"),
        (["model={}"], "say which with --preset NAME"),
        (["parallel.context_parallel_size=3"], "4 processes cannot hold"),
    ],
    ids=str,
)
def test_bad_input_is_a_line(options: list[str], words: str, config: str) -> None:
    arguments = ["rehearse", "--config", config, "--gpus", "4", "--gpu", "h100", *options]
    with pytest.raises(UserError) as error:
        main(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+20 compiler once.*CXX names 'no-such-compiler'"):
        shim.shim_file()
    monkeypatch.setenv("CXX", "false")  # one that cannot build it
    with pytest.raises(UserError, match="false cannot build"):
        shim.shim_file()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written .*set XDG_CACHE_HOME"):
        shim.shim_file()


@pytest.mark.slow
def test_the_runs_own_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run.yaml", write_mixture(tmp_path / "data"), training={"precision": "bf16"})
    options = ["--gpus", "2", "--gpu", "h100", "--packs", "data", "--ranks", "1", "--no-messages"]
    assert main(["rehearse", "--config", str(tmp_path / "run.yaml"), *options]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 microbatches" in printed
    assert "rank 1, which has most" in printed

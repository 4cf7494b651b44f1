"""The training benchmark: its clock's parts add up, its jobs run, its GPU part is ready and refuses a CPU."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_eagle.data.store.manifest import DataManifest
from megatron_eagle.errors import UserError
from megatron_eagle.training.run_config import complete_run_config
from tests.paths import REPO


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of tools/benchmarks, as tools/bench.py imports them."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    from benchmarks import step_clock, train, train_gpu

    yield {"clock": step_clock, "train": train, "gpu": train_gpu}
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture
def ticks(monkeypatch):
    """Time that passes when the test says so."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    return pass_seconds


def test_every_second_belongs_to_the_innermost_section(benchmarks, ticks):
    clock = benchmarks["clock"].StepClock()
    ticks(1)
    with clock.section("optimizer"):
        ticks(2)
        with clock.section("communication"):
            ticks(4)
        ticks(8)
    ticks(16)
    assert clock.settle() == {"other": 17, "optimizer": 10, "communication": 4}
    clock.restart()
    ticks(1)
    assert clock.settle() == {"other": 1}


def test_a_pass_through_the_encoder(benchmarks, ticks):
    """Forward and backward as Megatron's schedule times them: the encoder's part of both is vision."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            ticks(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            ticks(2 * ctx.seconds)
            return gradient, None

    class Part(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.weight, self.seconds = torch.nn.Parameter(torch.ones(1)), seconds

        def forward(self, x):
            return Slow.apply(x * self.weight, self.seconds)

    eagle = torch.nn.Module()
    eagle.vision_model, eagle.connector, eagle.language_model = Part(10), Part(1), Part(100)
    clock = benchmarks["clock"].StepClock()
    benchmarks["clock"].time_vision(clock, eagle)
    clock("forward-backward", log_level=1).start(barrier=True)
    clock("forward-compute", log_level=2).start()
    loss = eagle.language_model(eagle.connector(eagle.vision_model(torch.ones(1))))
    clock("forward-compute").stop()
    clock("forward-recv", log_level=2).start()
    ticks(5)
    clock("forward-recv").stop()
    clock("backward-compute", log_level=2).start()
    loss.sum().backward()
    clock("backward-compute").stop()
    clock("forward-backward").stop()
    found = clock.settle()
    assert (found["vision"], found["language"], found["communication"]) == (33, 300, 5)
    assert found["other"] == 0


def test_collectives_and_waits_are_communication(benchmarks, ticks, monkeypatch):
    class Work:
        def wait(self):
            ticks(3)
            return True

        def is_completed(self):
            return False

    def all_reduce(tensor, async_op=False):
        ticks(2)
        return Work() if async_op else None

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    clock = benchmarks["clock"].StepClock()
    with benchmarks["clock"].timed_communication(clock):
        assert torch.distributed.all_reduce(None) is None
        work = torch.distributed.all_reduce(None, async_op=True)
        ticks(1)
        assert not work.is_completed() and work.wait()
    assert torch.distributed.all_reduce is all_reduce
    assert clock.settle() == {"other": 1, "communication": 7}


def test_the_gpu_part_is_ready(benchmarks, tmp_path):
    """Each row's settings are a legal run; without a GPU all is refused in one line."""
    gpu = benchmarks["gpu"]
    data = {"fingerprint": "", "template": "train", "pad_token_id": 0, "sources": [], "max_pixels": 0}
    DataManifest(
        **data,
        tile_size=gpu.TILE,
        patch_size=gpu.PATCH,
        tokens_per_tile=256,
        vocab_size=600,
        image_token_id=7,
        lengths=list(gpu.LENGTHS),
        sampling={},
    ).save(tmp_path)
    for changes in gpu.FEATURES.values():
        settings = gpu.settings(tmp_path, gpu.LENGTHS[0])
        settings["checkpoint"] = {"path": str(tmp_path / "run")}
        for name, value in changes.items():
            section, key = name.split(".")
            settings[section][key] = {"true": True, "false": False}.get(value, value)
        complete_run_config(settings, world_size=1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="train_gpu needs a CUDA device"):
            gpu.run()


def test_no_row_of_the_gpu_part_saves(benchmarks, tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        started.append(command)
        return SimpleNamespace(stderr="CUDA out of memory", returncode=1)

    monkeypatch.setattr(benchmarks["gpu"].subprocess, "run", run)
    monkeypatch.setattr(benchmarks["gpu"], "read_steps", lambda _: [])
    found = benchmarks["gpu"]._measure(tmp_path / "run.yaml", tmp_path / "row", {"layers.loss": "plain"})
    assert set(found.values()) == {"out of memory"}
    assert {"checkpoint.save=false", "layers.loss=plain"} <= set(started[0])


@pytest.mark.slow
def test_both_jobs_run(benchmarks, tmp_path):
    """Pairs in one process, the split of two: every part that the layout has takes time."""
    train = benchmarks["train"]
    store = train.make_store(tmp_path, length=256, tile=64, patch=16, samples=40)
    settings = train.run_settings(tmp_path / "pairs", store, train.MODELS["tiny"], train.SKIP + 3)
    settings["data"]["length"] = 256
    (found,) = train.measure(tmp_path, settings, "pairs", 1)
    assert found["pairs"] == 2 and found["loop, wall ms"] > 0 and found["bare, CPU ms"] > 0
    settings["checkpoint"]["path"] = str(tmp_path / "split")
    settings["parallel"] = {"pipeline_model_parallel_size": 2}
    first, last = train.measure(tmp_path, settings, "split", 2)
    assert min(first[f"{part} ms"] for part in ("vision", "language", "communication", "optimizer")) > 0
    assert last["vision ms"] == 0 < last["language ms"], "the vision encoder is on the first stage"

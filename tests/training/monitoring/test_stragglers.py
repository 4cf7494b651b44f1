"""Straggler detection: what nvidia-resiliency-ext is asked, what a straggler becomes, what is refused."""

import sys
from collections import namedtuple
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.metrics import read_events, read_metrics
from megatron_eagle.training.run_config import load_run_config
from tests.training.test_training_loop import train_rank, write_run

Straggler = namedtuple("Straggler", ("rank", "node"))


PLACES = ("attribution.straggler", "straggler")  # in 0.6 and 0.7; in 0.4


class Detector:
    """Records how it is called; reports two stragglers after the second iteration."""

    calls: list = []

    @classmethod
    def initialize(cls, **settings):
        cls.calls.append(("initialize", settings["report_time_interval"]))

    @classmethod
    @contextmanager
    def detection_section(cls, name, profile_cuda):
        cls.calls.append((name, profile_cuda))
        yield

    @classmethod
    def generate_report_if_interval_elapsed(cls):
        cls.calls.append("report")
        return SimpleNamespace(identify_stragglers=cls.identify) if cls.calls.count("report") == 2 else None

    @staticmethod
    def identify(**thresholds):
        assert set(thresholds.values()) == {0.5} and len(thresholds) == 4
        first, third = (Straggler(rank, f"node{rank}") for rank in (1, 3))
        return {
            "straggler_gpus_relative": {third},
            "straggler_gpus_individual": set(),
            "straggler_sections_relative": {},
            "straggler_sections_individual": {"data": {first}},
        }

    @classmethod
    def shutdown(cls):
        cls.calls.append("shutdown")


@pytest.fixture
def installed(request, monkeypatch):
    """The library, with its detector where 0.6 and 0.7 have it, or where the test says."""
    names = ["nvidia_resiliency_ext"]
    for part in getattr(request, "param", PLACES[0]).split("."):
        names.append(f"{names[-1]}.{part}")
    package, *_, straggler = modules = [ModuleType(name) for name in names]
    package.__spec__, package.__path__ = SimpleNamespace(name=package.__name__), []
    straggler.Detector = Detector
    for module in (*modules, ModuleType("nvrx_cupti_module")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Detector, "calls", [])
    return straggler.__name__


@pytest.mark.parametrize("installed", PLACES, indirect=True)
def test_stragglers_are_events(installed, tmp_path):
    write_run(tmp_path)
    settings = ["resilience.stragglers={interval_seconds: 7, threshold: 0.5}", "training.stop_at_iteration=3"]
    train_rank(str(tmp_path / "run.yaml"), 1, settings)
    step = [("data", False), ("forward and backward", True), "report"]
    assert Detector.calls == [("initialize", 7), *(3 * step), "shutdown"]
    events = read_events(tmp_path / "run" / "logs" / "events.jsonl")
    assert [(event["iteration"], event["event"], event["rank"]) for event in events] == [
        (2, "straggler", 3),
        (2, "straggler", 1),
    ]
    assert [event["reason"] for event in events] == [
        "rank 3 on node3 is slower than the fastest rank: GPU",
        "rank 1 on node1 is slower than it was: data",
    ]


@pytest.mark.parametrize("installed", PLACES, indirect=True)
def test_what_is_missing_is_one_line(installed, tmp_path, monkeypatch):
    write_run(tmp_path)
    file, section = tmp_path / "run.yaml", "resilience.stragglers={}"
    assert load_run_config(file, [section]).resilience.stragglers.threshold == 0.7
    monkeypatch.setitem(sys.modules, "nvrx_cupti_module", None)
    with pytest.raises(AgreedError, match="cannot time kernels here .*: it needs CUDA's CUPTI"):
        train_rank(str(file), 1, [section])
    assert Detector.calls == [] and not read_metrics(tmp_path / "run" / "logs" / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "nvrx_cupti_module", ModuleType("nvrx_cupti_module"))
    monkeypatch.setitem(sys.modules, installed, None)
    with pytest.raises(AgreedError, match="has its straggler detection elsewhere than 0.4 to 0.7"):
        train_rank(str(file), 1, [section])
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(UserError, match="nvidia-resiliency-ext is not installed; `pip install"):
        load_run_config(file, [section])
    with pytest.raises(UserError, match="stragglers.threshold is 2.0: must lie between"):
        load_run_config(file, ["resilience.stragglers={threshold: 2}"])
    assert load_run_config(file).resilience.stragglers is None

"""The profiler's window: a trace per chosen rank that names what the step does."""

import gzip
import json
from collections import Counter

import pytest
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.profiler import ProfileConfig, StepProfiler
from megatron_eagle.training.run_config import load_run_config
from tests.training.test_training_loop import train_rank, write_run


def ranges(file) -> Counter:
    """How often each named range occurs in a trace."""
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_window_of_iterations(tmp_path):
    """Two of four iterations of one pack each."""
    write_run(tmp_path)
    settings = ["logging.profile={start: 2, steps: 2}", "training.stop_at_iteration=4"]
    train_rank(str(tmp_path / "run.yaml"), 1, [*settings, "training.global_batch_size=1"])
    found = ranges(tmp_path / "run" / "logs" / "profile" / "iter_0000002_rank_00000.json.gz")
    assert [found[name] for name in ("data", "forward", "backward", "optimizer")] == [2, 2, 2, 2]
    assert found["all-grads-sync"] == 2, "Megatron's own ranges keep their names"


def test_only_chosen_ranks_are_profiled(tmp_path):
    schedule = ModelParallelConfig()
    for rank in range(4):
        with StepProfiler(ProfileConfig(start=1, ranks=(1, 3)), tmp_path, rank, schedule) as profiler:
            profiler.step_begins(1)
            assert (schedule.timers is not None) == (rank in (1, 3))
        assert schedule.timers is None
    assert sorted(file.name for file in (tmp_path / "profile").iterdir()) == [
        "iter_0000001_rank_00001.json.gz",
        "iter_0000001_rank_00003.json.gz",
    ]


def test_a_run_that_ends_inside_the_window_writes_what_it_has(tmp_path):
    """And a resume that looks at other iterations writes beside it."""
    write_run(tmp_path)
    settings = ["logging.profile={start: 1, steps: 50}", "training.stop_at_iteration=1"]
    settings += ["training.global_batch_size=1"]
    train_rank(str(tmp_path / "run.yaml"), 1, settings)
    first = tmp_path / "run" / "logs" / "profile" / "iter_0000001_rank_00000.json.gz"
    assert ranges(first)["optimizer"] == 1

    kept = first.read_bytes()
    settings[:2] = ["logging.profile={start: 2}", "training.stop_at_iteration=2"]
    train_rank(str(tmp_path / "run.yaml"), 1, settings)
    traces = sorted(file.name for file in first.parent.iterdir())
    assert traces == [first.name, "iter_0000002_rank_00000.json.gz"] and first.read_bytes() == kept


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("{start: 0}", "logging.profile.start is 0: must lie between 1 and"),
        ("{start: 1, ranks: []}", "logging.profile.ranks is empty: name at least one"),
        (
            "{start: 1, ranks: [4]}",
            "logging.profile.ranks names rank 4: the run has 1 process, ",
        ),
    ],
)
def test_impossible_windows_are_refused(tmp_path, window, message):
    write_run(tmp_path)
    with pytest.raises(UserError, match=message):
        load_run_config(tmp_path / "run.yaml", [f"logging.profile={window}"], world_size=1)

"""The trainer by itself, with made-up data and observers that write down what they hear; without patches."""

import math
from pathlib import Path

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.evaluation import EvaluationConfig
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.preflight import check_runs
from megatron_eagle.training.resilience.policy import Preempted
from megatron_eagle.training.run_config import RunConfig, load_run_config
from megatron_eagle.training.setup import open_run
from megatron_eagle.training.train import standard_observers, train
from megatron_eagle.training.trainer import Trainer
from tests.training.synthetic_data import SyntheticLoader
from tests.training.test_training_loop import write_run


class Recorder(Observer):
    """Writes down what it hears, in a list that several share."""

    def __init__(self, name: str, heard: list) -> None:
        self.name, self.heard = name, heard

    def note(self, *what) -> None:
        self.heard.append((self.name, *what))

    def __enter__(self):
        self.note("open")
        return self

    def __exit__(self, kind, error, trace):
        self.note("close", kind)

    def step_begins(self, iteration):
        self.note("begins", iteration)

    def phase(self, iteration, name):
        self.note(name, iteration)

    def step_ended(self, step, tell):
        self.note("ended", step.iteration)
        tell.event(step.iteration, "heard", f"by {self.name}")

    def between_steps(self, step, tell):
        self.note("between", step.iteration)

    def step(self, metrics):
        self.note("numbers", metrics.iteration)

    def evaluation(self, metrics):
        self.note("evaluated", metrics.iteration)

    def event(self, iteration, kind, reason, **details):
        self.note(kind, iteration, reason)

    def message(self, text):
        self.note("message", text)


class Unopened(Recorder):
    def __enter__(self):
        raise UserError("no room")


@pytest.fixture
def config(tmp_path):
    """`config(*overrides)`: a run of made-up packs in `tmp_path`."""
    write_run(tmp_path)
    return lambda *overrides: load_run_config(tmp_path / "run.yaml", overrides, world_size=1)


@pytest.fixture
def heard() -> list:
    return []


def test_a_step_without_observers(config):
    """It needs nobody who looks on; what it was is its result."""
    with open_run(config("training.stop_at_iteration=2"), SyntheticLoader) as run:
        trainer = Trainer(run)
        before = [p.detach().clone() for model in run.models for p in model.parameters()]
        first = trainer.step()
        assert (first.iteration, first.is_last, first.first_pack, first.told_to_stop) == (1, False, 0, False)
        assert math.isfinite(first.loss) and first.grad_norm > 0 and first.lr == 0
        assert first.totals.samples == 4 and first.seconds > first.data_seconds > 0
        assert set(first.datasets.loss) == {"even", "odd", "absent"}
        second = trainer.step()
        assert (second.iteration, second.is_last, second.first_pack) == (2, True, 4) and second.lr > 0
        assert (run.state.iteration, run.state.consumed_packs) == (2, 8)
        assert run.state.recent_losses == [first.loss, second.loss]
        after = [p for model in run.models for p in model.parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_observers_hear_everything_in_their_order(config, heard):
    observers = [Recorder("a", heard), Recorder("b", heard)]
    with open_run(config("training.stop_at_iteration=1"), SyntheticLoader) as run:
        Trainer(run, observers).train(["a note"])
    phases = ("data", 1), ("forward and backward", 1), ("optimizer", 1)
    for what in ("open",), ("message", "a note"), ("begins", 1), *phases:
        assert [heard.pop(0), heard.pop(0)] == [("a", *what), ("b", *what)]
    assert heard == [
        ("a", "ended", 1),
        ("a", "heard", 1, "by a"),
        ("b", "heard", 1, "by a"),
        ("b", "ended", 1),
        ("a", "heard", 1, "by b"),
        ("b", "heard", 1, "by b"),
        ("a", "between", 1),
        ("b", "between", 1),
        ("b", "close", None),
        ("a", "close", None),
    ]


def test_the_order_of_those_who_always_look_on(config, heard, tmp_path):
    """Numbers, evaluation, save."""

    class HeldOutLoader(SyntheticLoader):
        packs_per_epoch = 4

    def observe(run):
        return [*standard_observers(run), Recorder("r", heard)]

    settings = [f"evaluation.data={tmp_path / 'data'}", "evaluation.interval=1", "checkpoint.save_interval=1"]
    train(config(*settings, "training.stop_at_iteration=2"), open_loader=HeldOutLoader, observe=observe)
    step = "begins", "data", "forward and backward", "optimizer", "numbers", "ended", "heard"
    between = "evaluation", "evaluated", "save", "between"
    told = [note[1:3] for note in heard if note[1] not in ("open", "message", "close")]
    assert told == [(what, iteration) for iteration in (1, 2) for what in step + between]


def test_all_are_closed_where_one_cannot_be_opened(config, heard):
    observers = [Recorder("a", heard), Recorder("b", heard), Unopened("c", heard), Recorder("d", heard)]
    with (
        open_run(config(), SyntheticLoader) as run,
        pytest.raises(AgreedError, match="no room"),
    ):
        Trainer(run, observers).train()
    closed = [("b", "close", AgreedError), ("a", "close", AgreedError)]
    assert heard == [("a", "open"), ("b", "open"), *closed]
    assert run.state.iteration == 0


class BrokenLoader(SyntheticLoader):
    """Its first batch cannot be read."""

    def step(self, consumed_packs):
        raise UserError("the store is damaged")


class Failing(Recorder):
    """A mistake in an observer."""

    def step_ended(self, step, tell):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("loader", "failing", "error"),
    [(BrokenLoader, Recorder, AgreedError), (SyntheticLoader, Failing, ZeroDivisionError)],
    ids=["data", "an observer"],
)
def test_all_are_closed_where_a_step_fails(config, heard, loader, failing, error):
    observers = [Recorder("a", heard), failing("b", heard), Recorder("c", heard)]
    with pytest.raises(error), open_run(config(), loader) as run:
        Trainer(run, observers).train()
    assert heard[-3:] == [(name, "close", error) for name in "cba"]
    assert not torch.distributed.is_initialized()


def test_told_to_stop(config, heard):
    """After the step under way, when all have done what they do between steps."""
    stop: list[str] = []

    class Stopping(Recorder):
        def step_begins(self, iteration):
            if iteration == 2:
                stop.append("SIGUSR1")

    with (
        open_run(config(), SyntheticLoader) as run,
        pytest.raises(Preempted, match="after iteration 2") as stopped,
    ):
        Trainer(run, [Stopping("a", heard)], stop).train()
    assert heard[-3:] == [
        ("a", "between", 2),
        ("a", "preempted", 2, str(stopped.value)),
        ("a", "close", Preempted),
    ]


def test_the_first_loader_is_closed_where_the_second_cannot_be_opened(config, tmp_path):
    opened, closed = [], []

    class OnlyOne(SyntheticLoader):
        def __init__(self, *arguments, **settings):
            if opened:
                raise UserError("no held-out packs")
            super().__init__(*arguments, **settings)
            opened.append(self)

        def close(self):
            closed.append(self)

    evaluating = config()
    evaluating.evaluation = EvaluationConfig(str(tmp_path / "data"), 1)
    with pytest.raises(AgreedError, match="no held-out packs"):
        train(evaluating, open_loader=OnlyOne)
    assert len(opened) == 1 and closed == opened


def lines(logs: Path) -> list[int]:
    return [m.iteration for m in read_metrics(logs / "metrics.jsonl")]


def test_a_new_run_does_not_drop_the_lines_of_another(config, tmp_path):
    """But those that it wrote itself before it was killed, it writes again."""
    logs = tmp_path / "logs"
    here = [f"logging.path={logs}", "training.stop_at_iteration=2"]

    def start(run: RunConfig) -> None:
        train(run, open_loader=SyntheticLoader)

    start(config(*here))
    other = config(*here, f"checkpoint.path={tmp_path / 'other'}")
    for begin in (start, lambda run: check_runs([run], 1)):
        with pytest.raises(UserError, match=f"logging.path: {logs} holds the logs of another run") as refused:
            begin(other)
        assert "\n" not in str(refused.value)
    assert lines(logs) == [1, 2] and not (tmp_path / "other").exists()

    (tmp_path / "run" / "latest_checkpointed_iteration.txt").unlink()  # as if killed before it could save
    start(config(*here, "training.stop_at_iteration=1"))
    assert lines(logs) == [1]
    start(config(*here, "training.stop_at_iteration=3"))
    assert lines(logs) == [1, 2, 3]

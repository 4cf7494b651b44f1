"""Where overrides may stand among the options of `train`, and what it says of how a run ended."""

from unittest.mock import Mock

import pytest

from megatron_eagle.commands.train import main
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training import stages
from megatron_eagle.training.resilience.policy import Preempted


@pytest.fixture
def read(monkeypatch):
    """What the command reads of a run's file: overrides and stage. Nothing trains."""
    found = []
    monkeypatch.setattr(
        stages,
        "load_stages",
        lambda path, overrides, stage: found.append((path, list(overrides), stage)) or [],
    )
    monkeypatch.setattr(stages, "train_stages", lambda configs, _: None)
    return found


@pytest.mark.parametrize(
    "words",
    [
        "--config F --stage two a.b=1 c.d=2",
        "--config F a.b=1 --stage two c.d=2",
        "a.b=1 --config F --stage two c.d=2",
        "--config F a.b=1 c.d=2 --stage two",
    ],
)
def test_overrides_stand_before_between_and_after_options(read, words):
    assert main(["run", *words.split()]) == 0
    assert read == [("F", ["a.b=1", "c.d=2"], "two")]


@pytest.mark.parametrize("words", ["run --config F a.b=1 --stagger two", "status R a.b=1"])
def test_what_is_no_option_is_refused(read, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2 and not read
    assert "unrecognized arguments: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ends_with", "status", "noted"),
    [
        (Preempted("stopped after iteration 3, which is saved", 3), 0, "stopped 3\n"),
        (Preempted("stopped after iteration 3, not saved", None), 0, None),
        (AgreedError("the disk is full"), 0, "failed\n"),
        (None, 0, None),
    ],
    ids=["stopped", "stopped and not saved", "a mistake", "finished"],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_outcome_of_a_run(ends_with, status, noted, rank, tmp_path, monkeypatch, capsys):
    """The first rank notes it; every rank ends well, so that torchrun starts nothing again."""

    def end(*_):
        if ends_with is not None:
            raise ends_with

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(stages, "load_stages", lambda *_, **__: [])
    monkeypatch.setattr(stages, "train_stages", end)
    outcome = tmp_path / "outcome"
    assert main(["run", "--config", "F", "--outcome", str(outcome)]) == status
    assert (outcome.read_text() if outcome.exists() else None) == (noted if rank == "0" else None)
    said = capsys.readouterr().err
    assert (str(ends_with) in said) == (ends_with is not None and rank == "0")


@pytest.mark.parametrize(
    ("ends_with", "status"), [(Preempted("stopped", 3), 75), (AgreedError("the disk is full"), 2)]
)
def test_an_outcome_that_cannot_be_noted_is_a_status(ends_with, status, tmp_path, monkeypatch):
    """Or a script would take the run for finished, and start what waits for it."""
    monkeypatch.setattr(stages, "load_stages", lambda *_, **__: [])
    monkeypatch.setattr(stages, "train_stages", Mock(side_effect=ends_with))
    assert main(["run", "--config", "F", "--outcome", str(tmp_path / "gone" / "outcome")]) == status


def test_what_one_rank_finds_is_tried_again(tmp_path, monkeypatch):
    """Another node may not have it: torchrun is to see it."""

    def end(*_):
        raise UserError("this node has 7 GPUs")

    monkeypatch.setattr(stages, "load_stages", lambda *_, **__: [])
    monkeypatch.setattr(stages, "train_stages", end)
    with pytest.raises(UserError, match="7 GPUs"):
        main(["run", "--config", "F", "--outcome", str(tmp_path / "outcome")])
    assert not (tmp_path / "outcome").exists()

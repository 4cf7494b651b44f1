"""Where overrides may stand among the options of `train`."""

import pytest

from megatron_eagle.commands.train import main
from megatron_eagle.training import stages


@pytest.fixture
def read(monkeypatch):
    """What the command reads of a run's file: overrides and stage. Nothing trains."""
    found = []
    monkeypatch.setattr(
        stages,
        "load_stages",
        lambda path, overrides, stage: found.append((path, list(overrides), stage)) or [],
    )
    monkeypatch.setattr(stages, "train_stages", lambda configs: None)
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

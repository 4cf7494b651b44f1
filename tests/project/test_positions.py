"""`max_position_embeddings` is a property of the run: raised to its packs, recorded, never lowered."""

import shutil
from pathlib import Path

import pytest
import yaml

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.errors import UserError
from megatron_eagle.positions import new_tokens
from megatron_eagle.training.run_config import load_run_config
from tests.training.synthetic_data import LENGTH
from tests.training.test_training_loop import train_rank, write_run

NAME = "model.text.max_position_embeddings"
RAISED = f"{NAME} is raised from 32 to 64, the tokens of this run's packs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one step on packs of 64 tokens, of a model that is made for 32."""
    root = tmp_path_factory.mktemp("positions")
    write_run(root)
    train_rank(str(root / "run.yaml"), 1, [f"{NAME}=32", "training.stop_at_iteration=1"])
    return root


def settled(folder, *overrides: str) -> tuple[int, list[str]]:
    """What a run of `folder` has of the value and says of it."""
    config = load_run_config(folder / "run.yaml", overrides, world_size=1)
    return config.model.text.max_position_embeddings, config.notes


def test_a_run_raises_it_to_its_packs_and_says_so_once(tmp_path, capsys):
    write_run(tmp_path)
    assert settled(tmp_path, f"{NAME}=32") == (LENGTH, [RAISED])
    for stop in (1, 2):
        train_rank(str(tmp_path / "run.yaml"), 1, [f"{NAME}=32", f"training.stop_at_iteration={stop}"])
        recorded = yaml.safe_load((tmp_path / "run" / f"iter_000000{stop}" / "run.yaml").read_text())
        assert recorded["model"]["text"]["max_position_embeddings"] == LENGTH
        assert "notes" not in recorded
        assert (RAISED in capsys.readouterr().err) == (stop == 1)


@pytest.mark.parametrize(
    ("overrides", "value", "says"),
    [
        ([], LENGTH, ""),  # the preset's 32768 is not what these weights were trained for
        ([f"{NAME}=64"], LENGTH, ""),
        (["model="], LENGTH, ""),
        ([f"{NAME}=32"], LENGTH, f"{NAME} stays 64 as in the checkpoint: 32 would lower it"),
        (
            [f"{NAME}=100"],
            100,
            f"warning: {NAME} is 100 as the run's file says, beyond the 64 of the checkpoint and the 64 "
            "tokens of this run's packs: nothing is trained there",
        ),
    ],
)
@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "started from"])
def test_a_checkpoint_says_what_it_was_trained_for(folder, tmp_path, resumed, overrides, value, says):
    run = folder / "run"
    paths = [] if resumed else [f"checkpoint.load={run}", f"checkpoint.path={tmp_path / 'new'}"]
    assert settled(folder, *paths, *overrides) == (value, [says] if says else [])


def test_a_model_without_a_checkpoint_has_what_its_file_says(tmp_path):
    write_run(tmp_path)
    assert settled(tmp_path) == (32768, [])
    warning = "beyond the 64 tokens of this run's packs: nothing is trained there"
    assert settled(tmp_path, f"{NAME}=100") == (
        100,
        [f"warning: {NAME} is 100 as the run's file says, {warning}"],
    )


def test_a_value_of_its_own_beside_the_model_of_the_checkpoint(tmp_path):
    """The run's file has no model section but this value: all else is the checkpoint's, not a default."""
    write_run(tmp_path)
    train_rank(
        str(tmp_path / "run.yaml"), 1, ["model.text.intermediate_size=96", "training.stop_at_iteration=1"]
    )
    start = ["model=", f"checkpoint.load={tmp_path / 'run'}", f"checkpoint.path={tmp_path / 'new'}"]
    config = load_run_config(tmp_path / "run.yaml", [*start, f"{NAME}=40000"], world_size=1)
    assert config.model.text.intermediate_size == 96
    assert config.model.text.max_position_embeddings == 40000 and "warning" in config.notes[0]


def test_yarn_says_how_far_a_run_reaches(folder, tmp_path):
    """A run from these weights may switch it on; the run itself goes on as it was begun."""

    def yarn(factor: float) -> list[str]:
        scaling = f"{{factor: {factor}, original_max_position_embeddings: {LENGTH // 2}}}"
        return [f"{NAME}=32", f"model.text.rope_scaling={scaling}"]

    new = [f"checkpoint.path={tmp_path / 'new'}", f"checkpoint.load={folder / 'run'}"]
    says = f"{NAME} is raised from {LENGTH} to {2 * LENGTH}, which rope_scaling reaches"
    assert settled(folder, *new, *yarn(4)) == (2 * LENGTH, [says])
    with pytest.raises(UserError, match=f"{NAME} is {LENGTH}: rope_scaling reaches 48, its factor 1.5 times"):
        settled(folder, *new, *yarn(1.5))
    with pytest.raises(UserError, match="another model: model.text.rope_scaling is None there and Yarn"):
        settled(folder, *yarn(4))


@pytest.mark.parametrize(
    ("scaling", "value", "notes"),
    [
        (".factor=4", 2 * LENGTH, 0),
        (".factor=2", LENGTH, 1),
        ("=null", LENGTH, 2),  # those that YaRN had stretched, raised to the packs
        (".factor=6", 3 * LENGTH, 1),
    ],
)
def test_a_run_from_weights_with_yarn_may_have_less_of_it(folder, tmp_path, scaling, value, notes):
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (file,) = copy.glob("iter_*/run.yaml")
    recorded = yaml.safe_load(file.read_text())
    recorded["model"]["text"] |= {
        "rope_scaling": {"factor": 4, "original_max_position_embeddings": LENGTH // 2},
        "max_position_embeddings": 2 * LENGTH,
    }
    file.write_text(yaml.safe_dump(recorded))
    new = ["model=", f"checkpoint.path={tmp_path / 'new'}", f"checkpoint.load={copy}"]
    found, says = settled(folder, *new, f"model.text.rope_scaling{scaling}")
    assert (found, len(says)) == (value, notes)
    assert settled(folder, *new, f"model.text.rope_scaling{scaling}", f"{NAME}={value}")[0] == value


def test_other_sizes_stay_a_difference_of_architecture(folder):
    with pytest.raises(UserError, match="another model: model.text.hidden_size is 64 there and 128 here; "):
        settled(folder, f"{NAME}=32", "model.text.hidden_size=128")


def test_a_checkpoint_of_before_counts_its_packs(folder, tmp_path):
    """Version 0.1.0 recorded the source's value beside the packs' length."""
    copy = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    (file,) = copy.glob("iter_*/run.yaml")
    recorded = yaml.safe_load(file.read_text())
    recorded["model"]["text"]["max_position_embeddings"] = 32
    file.write_text(yaml.safe_dump(recorded))
    assert read_model_config(copy).text.max_position_embeddings == LENGTH


def test_an_answer_ends_where_the_positions_do(capsys):
    assert new_tokens(90, 8, 100, allow=False) == 8
    assert new_tokens(90, 50, 100, allow=False) == 11  # the last one is never read
    assert new_tokens(100, 50, 100, allow=False) == 1
    with pytest.raises(UserError, match="the prompt has 1,001 tokens and the model was trained for 100 "):
        new_tokens(1001, 1, 100, allow=False)
    assert new_tokens(90, 11, 100, allow=True) == 11 and not capsys.readouterr().err
    assert new_tokens(90, 12, 100, allow=True) == 12
    assert capsys.readouterr().err.startswith(
        "warning: a prompt of 90 tokens and up to 12 new ones go beyond"
    )

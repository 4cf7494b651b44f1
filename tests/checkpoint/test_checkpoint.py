"""What a checkpoint promises: exact resume, any layout, a previous one that survives, nothing unsafe."""

import json
import os
import pickle
import shutil

import pytest
import torch

from megatron_eagle.checkpoint import (
    TRACKER,
    checkpoint_folder,
    read_index,
    read_model_config,
    read_train_state,
)
from megatron_eagle.checkpoint.manifest import write_manifest
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from tests.checkpoint.steps import EAGLE, save_fresh, save_killed, save_on_full_disk, steps
from tests.parallel.cases import tiny_model
from tests.parallel.harness import launch

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    """Four steps in one process."""
    return steps(1, {}, until=4)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 2, written by one process."""
    root = tmp_path_factory.mktemp("saved")
    steps(1, {}, until=2, save=str(root))
    return root


@pytest.fixture
def copy(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_resume_is_bitwise_exact(saved, uninterrupted):
    resumed = steps(1, {}, until=4, load=str(saved))[0]
    assert resumed["start"] == (2, 8)
    assert resumed["losses"] == uninterrupted["losses"][2:]
    assert resumed["norms"] == uninterrupted["norms"][2:]
    assert resumed["lr"] == uninterrupted["lr"][2:]
    for name, parameter in uninterrupted["parameters"].items():
        assert torch.equal(parameter, resumed["parameters"][name]), name


def test_bf16_keeps_its_fp32_main_parameters(tmp_path):
    whole = steps(1, {}, until=4, dtype=torch.bfloat16)[0]
    steps(1, {}, until=2, dtype=torch.bfloat16, save=str(tmp_path))
    resumed = steps(1, {}, until=4, dtype=torch.bfloat16, load=str(tmp_path))[0]
    assert resumed["losses"] == whole["losses"][2:]
    for name, parameter in whole["parameters"].items():
        assert torch.equal(parameter, resumed["parameters"][name]), name


def test_frozen_parts_and_their_learning_rates(tmp_path):
    """The second stage of two pipeline stages trains nothing; the parts' groups differ in nothing but lr."""
    settings = {"trainable": ["vision", "connector"], "lr_multipliers": {"vision": 0.1}}
    whole = steps(1, {}, until=4, optimizer_settings=settings)[0]
    steps(2, PP2, until=2, save=str(tmp_path / "pp2"), optimizer_settings=settings)
    moved = steps(1, {}, until=4, load=str(tmp_path / "pp2"), optimizer_settings=settings)[0]
    assert moved["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    steps(1, {}, until=2, save=str(tmp_path / "one"), optimizer_settings=settings)
    resumed = steps(1, {}, until=4, load=str(tmp_path / "one"), optimizer_settings=settings)[0]
    assert resumed["losses"] == whole["losses"][2:] and resumed["norms"] == whole["norms"][2:]


def test_weights_only_start(saved, uninterrupted):
    """From the weights of step 2 with a fresh optimizer: the same loss, iteration 0."""
    started = steps(2, TP2, until=1, load=str(saved), weights_only=True)[0]
    assert started["start"] == (0, 0)
    assert started["losses"][0] == pytest.approx(uninterrupted["losses"][2], rel=1e-5)


def test_without_optimizer(tmp_path, uninterrupted):
    """What a converter does: model only, one process; training can start from it."""
    launch(save_fresh, 1, EAGLE, str(tmp_path))
    started = steps(1, {}, until=1, load=str(tmp_path), weights_only=True)[0]
    assert started["losses"][0] == uninterrupted["losses"][0]
    with pytest.raises(AgreedError, match="lacks optimizer state that the run needs"):
        steps(1, {}, until=1, load=str(tmp_path))


def test_what_is_beside_the_tensors(saved):
    folder = checkpoint_folder(saved)
    assert folder.name == "iter_0000002" and (saved / TRACKER).read_text() == "2\n"
    assert json.loads((folder / "state.json").read_text()) == {
        "iteration": 2,
        "consumed_packs": 8,
        "recent_losses": [],
        "started_from": None,
        "read": None,
    }
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert listed.keys() | {"manifest.json"} == set(os.listdir(folder))
    assert read_model_config(saved) == EAGLE
    assert not [name for name in os.listdir(saved) if name.startswith(".")], "no partial files are left"


def test_another_architecture_is_refused_with_names(saved):
    deeper = tiny_model(num_hidden_layers=6)
    with pytest.raises(AgreedError, match=r"has shape .* the model's is .*: another architecture"):
        steps(1, {}, eagle=deeper, until=3, load=str(saved))
    tied = tiny_model(tie_word_embeddings=True)
    with pytest.raises(AgreedError, match="holds tensors that the model lacks: .*output_layer.weight"):
        steps(1, {}, eagle=tied, until=3, load=str(saved))


@pytest.mark.parametrize(
    "points",
    [
        ("middle of a file", "manifest", "tracker"),
        pytest.param(
            ("tensors", "common.pt", "index", "run.yaml", "state.json", "rename"), marks=pytest.mark.slow
        ),
    ],
    ids=["three", "six-more"],
)
def test_a_killed_save_leaves_the_previous_checkpoint(copy, points):
    """A process dies (as by kill -9) while it saves iteration 3, at one point after the other."""
    for point in points:
        with pytest.raises(RuntimeError, match="ended without a result"):
            launch(save_killed, 1, EAGLE, str(copy), point)
        assert read_train_state(copy).iteration == 2, point
    with pytest.raises(RuntimeError, match="ended without a result|failed"):
        launch(save_killed, 2, EAGLE, str(copy), "one rank")
    resumed = steps(1, {}, until=3, load=str(copy), save=str(copy))[0]
    assert resumed["start"] == (2, 8) and read_train_state(copy).iteration == 3


def test_a_kill_while_old_checkpoints_are_deleted(copy):
    """The new one is complete by then; what was left half-deleted goes with the next."""
    with pytest.raises(RuntimeError, match="ended without a result"):
        launch(save_killed, 1, EAGLE, str(copy), "retention")
    assert sorted(path.name for path in copy.glob("*iter_*")) == [".iter_0000002.deleting", "iter_0000003"]
    steps(1, {}, until=4, load=str(copy), save=str(copy), keep_last=2)
    assert sorted(path.name for path in copy.glob("*iter_*")) == ["iter_0000003", "iter_0000004"]


@pytest.mark.parametrize("limit", [500, 60_000], ids=["common-file", "tensor-file"])
def test_a_full_disk_keeps_the_previous_checkpoint(copy, limit):
    message = launch(save_on_full_disk, 1, EAGLE, str(copy), limit)[0]
    assert "iteration 3 could not be saved: " in message and "\n" not in message
    assert message.endswith("iteration 2 stays the latest checkpoint")
    assert not list(copy.glob(".iter*")), "the space is given back"
    assert steps(1, {}, until=3, load=str(copy))[0]["start"] == (2, 8)


def test_a_flipped_byte_is_refused_by_name(copy):
    """In any file, by every rank."""
    folder = checkpoint_folder(copy)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        named = "" if file.name == "manifest.json" else file.name  # then the files differ from it
        with pytest.raises(AgreedError, match=f"{named}: .*(damaged|manifest)"):
            steps(1, {}, until=3, load=str(copy))
        file.write_bytes(content)
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(RuntimeError, match=r"distcp: missing; copy the checkpoint again in full"):
        steps(2, {}, until=3, load=str(copy))


def test_the_latest_checkpoint_is_never_overwritten(copy):
    with pytest.raises(AgreedError, match="already holds iteration 2; choose another folder"):
        steps(1, {}, until=2, load=str(copy), save=str(copy))


def damage_tracker(root):
    (root / TRACKER).write_text("soon")


def lose_file(root):
    (root / "iter_0000002" / "common.pt").unlink()


def lose_tracker(root):
    (root / TRACKER).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lose_tracker, "not a checkpoint, it has no latest_checkpointed_iteration.txt"),
        (damage_tracker, "expected an iteration number, found 'soon'"),
        (lose_file, "incomplete checkpoint, common.pt is missing"),
    ],
)
def test_not_a_checkpoint(damage, message, copy):
    damage(copy)
    with pytest.raises(UserError, match=message):
        checkpoint_folder(copy)


def test_an_iteration_folder_is_not_the_checkpoint(saved):
    with pytest.raises(UserError, match=f"name its parent {saved}"):
        checkpoint_folder(saved / "iter_0000002")


def sign(folder):
    """A manifest that fits what the folder holds, as whoever made the files would write it."""
    write_manifest(folder, {})


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_an_index_that_runs_code_is_refused(copy, tmp_path):
    folder = checkpoint_folder(copy)
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "harm")))
    sign(folder)
    with pytest.raises(AgreedError, match=r"not a checkpoint's index, .*: it names \w+\.mkdir"):
        steps(1, {}, until=4, load=str(copy))
    assert not (tmp_path / "harm").exists()


def test_common_content_that_runs_code_is_refused(copy, tmp_path):
    folder = checkpoint_folder(copy)
    torch.save({"optimizer": Harmful(tmp_path / "harm")}, folder / "common.pt")
    sign(folder)
    with pytest.raises(AgreedError, match="common.pt: damaged, or it holds more than plain values"):
        steps(1, {}, until=4, load=str(copy))
    assert not (tmp_path / "harm").exists()


def test_damaged_tensors_are_refused(copy):
    file = next(checkpoint_folder(copy).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(AgreedError, match=f"{file.name}: 100000 bytes, and .* were saved"):
        steps(1, {}, until=4, load=str(copy))
    sign(file.parent)
    with pytest.raises(AgreedError, match="a file of tensors is damaged"):
        steps(1, {}, until=4, load=str(copy))


def test_a_truncated_index_is_refused(copy):
    index = checkpoint_folder(copy) / ".metadata"
    index.write_bytes(index.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a checkpoint's index, or a damaged one"):
        read_index(checkpoint_folder(copy))

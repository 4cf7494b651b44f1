"""Runs that cannot be: each is refused in one line, before the first step and before it writes anything."""

import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from megatron_eagle.data.packing.index import read_packs, write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import detect_device
from megatron_eagle.training.preflight import check_runs
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.stages import load_stages
from megatron_eagle.training.train import train
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.parallel.harness import launch
from tests.training.test_training import train_main

SHORT, LONG = 128, 256


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a packed store of two lengths, a tokenizer, and a run of one iteration that has ended."""
    folder = tmp_path_factory.mktemp("made")
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(30)]
    store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (SHORT, LONG))
    for length in (SHORT, LONG):
        write_packs(store, length, seed=0)
    store.rename(folder / "data")
    sections = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(folder / "data"), "length": LONG},
        "training": {"train_iterations": 1, "global_batch_size": 1, "precision": "fp32"},
        "checkpoint": {"path": str(folder / "run")},
        "logging": {"progress": False, "tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    train(load_run_config(folder / "run.yaml"))
    return folder


@pytest.fixture
def refused(made, tmp_path):
    """`refused(*overrides, data=FOLDER)` reads, checks and starts a new run; the line that it ends with."""

    def start(*overrides: str, data: Path | None = None, world_size: int = 1) -> str:
        paths = [f"checkpoint.path={tmp_path / 'new'}"]
        paths += [f"data.path={data}"] if data is not None else []
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as caught:
            train(load_run_config(made / "run.yaml", [*paths, *overrides], world_size=world_size))
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before, "nothing was written"
        assert not torch.distributed.is_initialized()
        return str(caught.value)

    return start


def copy_of_data(made: Path, to: Path) -> Path:
    return Path(shutil.copytree(made / "data", to))


def test_settings_that_contradict_each_other(refused):
    assert "lora trains the language model" in refused("lora={rank: 2}", "optimizer.trainable=[connector]")
    assert "this part is frozen" in refused(
        "optimizer.trainable=[connector]", "optimizer.lr_multipliers={vision: 2}"
    )
    assert "optimizer.min_lr is 1: must be at most lr 2e-05" in refused("optimizer.min_lr=1")
    assert "sequence" in refused("parallel.sequence_parallel=true")
    assert "training.stop_at_iteration is 5: must be at most train_iterations 1" in refused(
        "training.stop_at_iteration=5"
    )
    assert "first_new_token" in refused("optimizer.trainable=[new_token_rows]")


def test_layouts_and_tokens_that_the_vocabulary_does_not_have(refused):
    """371 tokens in 512 rows: tensor parallel ranks divide the rows, and no new token has a higher number."""
    divisible = ["num_attention_heads=6", "num_key_value_heads=3", "hidden_size=96", "intermediate_size=144"]
    sizes = [f"model.text.{size}" for size in divisible]
    sizes += [
        "model.vision.num_attention_heads=3",
        "model.vision.hidden_size=96",
        "training.global_batch_size=3",
    ]
    sizes += ["model.vision.intermediate_size=144"]
    three = refused(*sizes, "parallel.tensor_model_parallel_size=3", world_size=3)
    assert "3 does not divide the 512 padded vocabulary rows: choose 1" in three
    parts = "optimizer.trainable=[new_token_rows]"
    assert "optimizer.first_new_token is 371: must be below 371, the number of tokens" in refused(
        parts, "optimizer.first_new_token=371"
    )
    assert "first_new_token is -1: must lie" in refused(parts, "optimizer.first_new_token=-1")


def test_fewer_processes_or_gpus_than_the_layout(refused, monkeypatch):
    assert "1 processes cannot hold" in refused("parallel.context_parallel_size=2")
    assert refused(world_size=0) == "the number of processes is 0: must be at least 1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with (
        patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 2),
        pytest.raises(UserError, match="has 2 GPUs, too few for the 4 processes .* --nproc-per-node 2"),
    ):
        detect_device()


def other_tokenizer(folder: Path) -> None:
    """In a store: two words of the tokenizer change places."""
    file = folder / "tokenizer" / "tokenizer.json"
    text = Tokenizer.from_file(str(file)).to_str()
    text = text.replace('"a":', '"b-":').replace('"b":', '"a":').replace('"b-":', '"b":')
    file.write_text(text)


def test_data_of_another_tokenizer_than_the_checkpoint(made, refused, tmp_path):
    data = copy_of_data(made, tmp_path / "data")
    other_tokenizer(data)
    message = refused(f"checkpoint.load={made / 'run'}", data=data)
    assert message.startswith(f"{data}: prepared with another tokenizer than {made / 'run'}: token ")
    assert message.endswith("'b' in the data and 'a' in the checkpoint")


def test_the_same_tokenizer_written_in_another_way(made, tmp_path):
    data = copy_of_data(made, tmp_path / "data")
    file = data / "tokenizer" / "tokenizer.json"
    file.write_text(Tokenizer.from_file(str(file)).to_str(pretty=True) + "\n\n")
    load_run_config(made / "run.yaml", [f"data.path={data}"])


def test_a_checkpoint_of_another_architecture(made, refused):
    message = refused(f"checkpoint.load={made / 'run'}", "model.text.num_hidden_layers=2")
    assert "the checkpoint is of another model: model.text.num_hidden_layers is 4 there and 2 here" in message
    assert "no such folder; expected a checkpoint" in refused("checkpoint.load=absent")
    assert "not a checkpoint" in refused(f"checkpoint.load={made / 'data'}")


def test_a_resume_that_trains_other_parts(made):
    with pytest.raises(UserError) as refusal:
        load_stages(made / "run.yaml", ["optimizer.trainable=[connector]"], world_size=1)
    assert str(refusal.value).startswith(
        f"{made / 'run'}: optimizer.trainable is vision, connector, language there and connector here: "
    )
    load_stages(made / "run.yaml", ["optimizer.trainable=[language, connector, vision]"], world_size=1)


def test_a_pack_index_of_another_length_or_none(made, refused, tmp_path):
    data = copy_of_data(made, tmp_path / "data")
    index = data / str(LONG) / "packs.arrow"
    shutil.copy(data / str(SHORT) / "packs.arrow", index)
    message = refused(data=data)
    assert f"{index} was made for other data; run pack_data --data {data} --length {LONG}" in message
    index.unlink()
    assert f"{data} has no packs for length {LONG}; run pack_data" in refused(data=data)
    assert f"data.length is 64: {data} was prepared for {SHORT}, {LONG}" in refused(
        "data.length=64", data=data
    )


def test_output_that_cannot_be_written(made, refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    below = tmp_path / "file" / "run"
    assert refused(f"checkpoint.path={below}").startswith(f"{below}: ")
    assert refused(f"checkpoint.path={made / 'run'}", f"logging.path={below}").startswith(f"{below}: ")


def refusal(config: str, overrides: list[str]) -> str:
    """On each rank: what `train.py run` leaves to print, of an error that it ends with."""
    rank = str(torch.distributed.get_rank())
    with (
        patch.dict(os.environ, RANK=rank, WORLD_SIZE="2"),
        patch.object(sys, "argv", ["train.py", "run", "--config", config, *overrides]),
    ):
        try:
            assert train_main()() == 2
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("setting", ["layers.norm=apex", "layers.attention=flash", "layers.kernels=triton"])
def test_a_library_that_is_not_here_is_refused_once(made, tmp_path, setting):
    """By `run`, on one of its ranks; `check` cannot know the job's machine, and says so."""
    overrides = [setting, "training.precision=bf16", "training.global_batch_size=2"]
    overrides += [f"checkpoint.path={tmp_path / 'new'}"]
    printed, silent = launch(refusal, 2, str(made / "run.yaml"), overrides)
    assert printed.startswith(setting.replace("=", " ")) and not silent
    assert not (tmp_path / "new").exists()
    [_, note] = check_runs(load_stages(made / "run.yaml", overrides, world_size=2), 2)
    assert note == f"{tmp_path / 'new'}: not known without a GPU; here the run would end: {printed}"


def test_a_decoder_that_is_not_installed(made, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    message = refused("data.decoder=dali")
    assert message.startswith("data.decoder=dali: DALI cannot be imported")
    with pytest.raises(UserError, match=re.escape(message)):
        check_runs(load_stages(made / "run.yaml", ["data.decoder=dali"], world_size=1), 1)


def test_the_check_before_a_job_finds_the_same(made, tmp_path, monkeypatch, capsys):
    """`train.py check`, for a job of many processes, in one."""
    (tmp_path / "file").write_text("in the way")
    data = copy_of_data(made, tmp_path / "data")
    (data / str(SHORT) / "packs.arrow").unlink()
    for overrides, message in (
        ([f"checkpoint.path={tmp_path / 'file' / 'run'}"], "cannot be written: .*file is no folder"),
        ([f"logging.path={tmp_path / 'file' / 'logs'}"], "cannot be written: .*file is no folder"),
        ([f"data.path={data}", f"data.length={SHORT}"], "has no packs for length 128; run pack_data"),
        (["parallel.tensor_model_parallel_size=4"], "KV heads"),
        (
            [f"evaluation={{data: {made / 'data'}, interval: 1, batches: 9}}"],
            "9 global batches of 8 are asked",
        ),
    ):
        with pytest.raises(UserError, match=message):
            settings = [*overrides, "training.global_batch_size=8"]
            check_runs(load_stages(made / "run.yaml", settings, world_size=8), 8)
    command = ["train.py", "check", "--processes", "4", "--config", str(made / "run.yaml")]
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2"]
    monkeypatch.setattr("sys.argv", [*command, *layout, "training.train_iterations=3"])
    assert train_main()() == 0
    packs = len(read_packs(SampleStore(made / "data", LONG)))
    assert capsys.readouterr().out == (
        f"{made / 'run'}: TP2 x CP2; 3 iterations of 1 x {LONG} tokens, {3 / packs:.2f} epochs of "
        f"{made / 'data'}\n"
    )

"""Conversion without a model in memory: every layout loads what is written and writes what is read."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from megatron_eagle.checkpoint import (
    checkpoint_folder,
    load_checkpoint,
    read_index,
    read_model_config,
    save_checkpoint,
)
from megatron_eagle.convert.checkpoint_files import CheckpointWeights, key_of
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import build_model
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.convert.hf_folder import assert_same_weights
from tests.parallel.harness import launch
from tests.paths import REPO

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "TP1": (1, {}),
    "TP2+SP": (2, {**TP2, "sequence_parallel": True}),
    "PP2": (2, PP2),
    "TP2xPP2": (4, {**TP2, **PP2}),
}


def resave(source: str, target: str, parallel: dict) -> None:
    """On each rank: load an imported checkpoint, and save it as this layout does."""
    config = read_model_config(source)
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build_model(config, mesh, torch.device("cpu"))
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))  # what is not loaded will not be missed otherwise
        load_checkpoint(source, models=models)
        save_checkpoint(target, models=models, model_config=config, iteration=5)


# tests/parallel/test_golden.py loads an import in the layouts that are slow here.
@pytest.mark.parametrize(
    "layout",
    [name if name == "TP2xPP2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_every_layout_loads_an_import_and_is_exported(layout, source, checkpoint, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    launch(resave, world_size, str(checkpoint), str(tmp_path / "c"), parallel)
    shutil.copytree(checkpoint / "hf", tmp_path / "c" / "hf")
    export_hf(tmp_path / "c", tmp_path / "out")
    assert_same_weights(source, tmp_path / "out")


def test_no_process_group_and_no_model_are_made(source, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("not needed")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setattr("megatron_eagle.model.eagle.EagleModel.__init__", refuse)
    import_hf(source, tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out")
    assert_same_weights(source, tmp_path / "out")


def test_keys_have_their_layer_on_the_first_axis():
    name = "language_model.decoder.layers.11.mlp.linear_fc2.weight"
    assert key_of(name) == ("language_model.decoder.layers.mlp.linear_fc2.weight", (11,))
    assert key_of("connector.layer_norm.bias") == ("connector.layer_norm.bias", ())
    # Megatron's own key, of sequential and of grouped experts.
    expert = "language_model.decoder.layers.3.mlp.experts.12.linear_fc1.weight"
    key = "language_model.decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert key_of(expert) == (key, (3, 12))


def _truncate(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-3000])


def _rewrite_index(folder, change):
    index = read_index(folder)
    change(index)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(index, file)


def _point_elsewhere(folder):
    def change(index):
        for info in index.storage_data.values():
            info.relative_path = "../../secret"

    _rewrite_index(folder, change)


def _forget_a_chunk(folder):
    def change(index):
        del index.state_dict_metadata["language_model.decoder.layers.mlp.linear_fc1.weight"].chunks[1]

    _rewrite_index(folder, change)


def _forget_a_key(folder):
    _rewrite_index(folder, lambda index: index.state_dict_metadata.pop("connector.linear_fc1.bias"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "__0_0.distcp: damaged, .* cannot be read"),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
        (_point_elsewhere, "which is no file name"),
        (_forget_a_chunk, "do not hold all of language_model.decoder.layers.0.mlp.linear_fc1.weight"),
        (_forget_a_key, "lacks weights that the model needs .1.: connector.linear_fc1.bias"),
    ],
)
def test_damage_is_named_and_nothing_is_left(checkpoint, tmp_path, damage, message):
    shutil.copytree(checkpoint, tmp_path / "c")
    damage(checkpoint_folder(tmp_path / "c"))
    with pytest.raises(UserError, match=message) as error:
        export_hf(tmp_path / "c", tmp_path / "out", verify=False)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_flipped_byte_is_refused_by_name(checkpoint, tmp_path):
    """In values, where nothing but the manifest can tell; without a process group."""
    shutil.copytree(checkpoint, tmp_path / "c")
    file = checkpoint_folder(tmp_path / "c") / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"__0_0.distcp: its content is not what was saved \(SHA-256\)"):
        export_hf(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_hf(tmp_path / "c", tmp_path / "out", verify=False)


def test_adapters_of_another_run_are_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    run_file = checkpoint_folder(tmp_path / "c") / "run.yaml"
    run_file.write_text(run_file.read_text() + "lora: {rank: 2}\n")
    with pytest.raises(UserError, match="lacks weights.*lora_fc1.gate_proj_a"):
        export_hf(tmp_path / "c", tmp_path / "out", verify=False)


def test_reading_is_exact_across_chunks(checkpoint):
    """Gate and up rows lie in two chunks."""
    weights = CheckpointWeights(checkpoint)
    name = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
    whole = weights.read(name)
    assert whole.shape == (160, 48) and not whole[80:].equal(whole[:80])


@pytest.mark.slow
def test_real_widths_round_trip_in_little_memory(tmp_path):
    """Two language layers of the 8B model, 3 GB: bit-equal, and memory bounded by the largest shard."""
    command = [sys.executable, str(REPO / "tools" / "bench.py"), "convert", "--json", str(tmp_path / "card")]
    subprocess.run(command, check=True, capture_output=True)
    rows = {row["what"]: row for row in json.loads((tmp_path / "card").read_text())["rows"]}
    assert rows.keys() == {"cp", "import", "export (bit-equal)"}
    for what in ("import", "export (bit-equal)"):
        assert rows[what]["peak MB"] <= rows[what]["limit MB"]

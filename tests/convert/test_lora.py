"""LoRA on its way out: merged weights and peft's folder give the logits of the model in training."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_eagle.checkpoint import load_checkpoint, read_model_config, save_checkpoint
from megatron_eagle.convert.lora import CONFIG, WEIGHTS, export_adapter
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.inference import logits
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.lora import TARGETS, LoraConfig, adapters, add_lora
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.convert.hf_folder import TILE, TOKENS_PER_TILE, read_weights
from tests.parallel.harness import launch
from tests.paths import REPO

ALL = LoraConfig(rank=3, alpha=5.0)
SOME = LoraConfig(rank=2, alpha=3.0, target_modules=["v_proj", "o_proj", "gate_proj"])
# Name of a checkpoint -> its adapters, and the parts that trained.
RUNS = {"all": (ALL, ["language"]), "some": (SOME, ["connector", "language"])}


def save_adapted(source: str, root: str) -> None:
    """On two ranks, TP2+SP: the model of `source` with adapters, as runs save it in `root`/{name}."""
    config = read_model_config(source)
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    with model_parallel(parallel) as mesh:
        for name, (lora, trainable) in RUNS.items():
            models = build_model(config, mesh, torch.device("cpu"))
            load_checkpoint(source, models=models)
            add_lora(models, lora, seed=1)
            fill_b(models[0], mesh.tp.rank)
            run = {"model": config, "lora": lora, "optimizer": {"trainable": trainable}}
            save_checkpoint(f"{root}/{name}", models=models, run_config=run, iteration=3)


@torch.no_grad()
def fill_b(model, rank: int) -> None:
    """As if trained: each element of B a function of its layer, target and place in the whole matrix."""
    for layer, target, _, b in adapters(model):
        first = rank * len(b) if getattr(b, "tensor_model_parallel", False) else 0
        rows = torch.arange(first, first + len(b))[:, None] + 10 * layer + len(target)
        b.copy_(torch.sin(3 * rows + torch.arange(b.shape[1])) / 4)


@pytest.fixture(scope="module")
def adapted(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints of `RUNS`, which started from `checkpoint`. Do not write into them."""
    root = tmp_path_factory.mktemp("adapted")
    launch(save_adapted, 2, str(checkpoint), str(root))
    for name in RUNS:
        shutil.copytree(checkpoint / "hf", root / name / "hf")
    return {name: root / name for name in RUNS}


def prompt(config) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.image_token_index - 5, (1, 9 + TOKENS_PER_TILE), generator=generator)
    ids[:, 4 : 4 + TOKENS_PER_TILE] = config.image_token_index
    return ids, torch.rand(1, 3, TILE, TILE, generator=generator) * 2 - 1


@torch.no_grad()
def hf_logits(model) -> torch.Tensor:
    ids, pixels = prompt(model.config)
    return model(input_ids=ids, pixel_values=pixels).logits


def load(folder: Path):
    return Eagle2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def apply_adapter(model, folder: Path) -> None:
    """Does with the folder what peft's documentation says, and refuses what would not fit."""
    settings, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert settings["peft_type"] == "LORA" and settings["bias"] == "none" and not settings["fan_in_fan_out"]
    for name, module in model.named_modules():
        if re.fullmatch(settings["target_modules"], name):
            a, b = (tensors.pop(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
            assert a.shape == (settings["r"], module.in_features), name
            assert b.shape == (module.out_features, settings["r"]), name
            module.weight.data += settings["lora_alpha"] / settings["r"] * b @ a
    assert not tensors


def test_a_starts_as_kaiming_uniform_of_peft(adapted, tmp_path):
    """With a = sqrt(5): uniform within 1 / sqrt(in)."""
    export_adapter(adapted["all"], tmp_path)
    found = [tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if ".lora_A." in name]
    for a in found:
        peft = torch.nn.init.kaiming_uniform_(torch.empty(1000, a.shape[1]), a=5**0.5).abs().max().item()
        assert 0.8 * peft < a.abs().max().item() <= 1.001 * peft
    assert len(found) == len(TARGETS) * read_model_config(adapted["all"]).text.num_hidden_layers


@pytest.mark.parametrize("name", RUNS)
def test_merged_export_gives_the_logits_of_the_adapted_model(name, adapted, checkpoint, tmp_path):
    export_hf(adapted[name], tmp_path / "hf")
    model = load(tmp_path / "hf")
    unmerged = logits(adapted[name], *prompt(model.config))
    torch.testing.assert_close(hf_logits(model), unmerged, atol=1e-5, rtol=1e-5)
    base = logits(checkpoint, *prompt(model.config))
    assert (unmerged - base).abs().max() > 1e-2


def test_merging_touches_adapted_weights_only(adapted, source, tmp_path):
    export_hf(adapted["some"], tmp_path / "hf")
    ours, theirs = read_weights(tmp_path / "hf"), read_weights(source)
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {
        f"language_model.model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    }


def test_the_adapter_on_its_source_gives_the_same_logits(adapted, source, tmp_path):
    assert export_adapter(adapted["all"], tmp_path / "adapter") == [CONFIG, WEIGHTS]
    model = load(source)
    apply_adapter(model, tmp_path / "adapter")
    unmerged = logits(adapted["all"], *prompt(model.config))
    torch.testing.assert_close(hf_logits(model), unmerged, atol=1e-5, rtol=1e-5)


def test_names_and_settings_are_those_of_peft(adapted, tmp_path):
    export_adapter(adapted["all"], tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / WEIGHTS).keys()
    assert len(names) == 2 * len(TARGETS) * 2
    assert "base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.language_model.model.layers.0.mlp.down_proj.lora_B.weight" in names
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 5, 0.0)
    assert settings["base_model_name_or_path"] is None


def run_tool(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["convert_hf.py", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPO / "tools" / "convert_hf.py"), run_name="__main__")
    return exit.value.code or 0


def test_the_tool_writes_a_base_and_the_adapter_that_fits_it(adapted, tmp_path, monkeypatch, capsys):
    checkpoint, hf, adapter = adapted["some"], tmp_path / "hf", tmp_path / "adapter"
    assert run_tool(monkeypatch, "--checkpoint", checkpoint, "--adapter", adapter) == 2
    assert "connector trained besides the adapters" in capsys.readouterr().err
    assert run_tool(monkeypatch, "--checkpoint", checkpoint, "--hf", hf, "--adapter", adapter) == 0
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(hf)
    model = load(hf)
    apply_adapter(model, adapter)
    unmerged = logits(checkpoint, *prompt(model.config))
    torch.testing.assert_close(hf_logits(model), unmerged, atol=1e-5, rtol=1e-5)


def test_yarn_that_came_with_the_adapters_needs_its_base(adapted, tmp_path):
    """An adapter's folder says nothing of rotary positions: on the model that it started from it would
    compute something else."""
    start, run = (shutil.copytree(adapted["all"], tmp_path / name) for name in ("start", "run"))

    def record(folder: Path, **sections) -> None:
        (file,) = folder.glob("iter_*/run.yaml")
        recorded = yaml.safe_load(file.read_text()) | sections
        recorded["model"]["text"]["rope_scaling"] = {"factor": 2.0, "original_max_position_embeddings": 4096}
        file.write_text(yaml.safe_dump(recorded))

    record(run, checkpoint={"load": str(start)})
    for load in (start, tmp_path / "gone"):
        record(run, checkpoint={"load": str(load)})
        with pytest.raises(UserError, match="rope_scaling is not that of the model .*base too"):
            export_adapter(run, tmp_path / "adapter", verify=False)
    assert export_adapter(run, tmp_path / "adapter", base=tmp_path / "hf", verify=False)
    record(run, checkpoint={"load": str(start)})
    record(start)
    assert export_adapter(run, tmp_path / "adapter", verify=False)


def test_what_cannot_be_exported_is_refused(checkpoint, adapted, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="it has no LoRA adapters"):
        export_adapter(checkpoint, tmp_path / "adapter")
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(UserError, match="holds no adapters; choose a new or empty folder"):
        export_adapter(adapted["all"], tmp_path)
    assert run_tool(monkeypatch, "--checkpoint", adapted["all"]) == 2
    assert capsys.readouterr().err == "error: export: name --hf, --adapter or both\n"

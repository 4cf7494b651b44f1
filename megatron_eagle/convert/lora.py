"""LoRA adapters on their way out: merged into the weights that they adapt, or in a folder that peft loads.

The folder has peft's two files (huggingface.co/docs/peft, "PEFT checkpoint format"):

    adapter_config.json         rank, alpha, which modules; `target_modules` is a pattern, because the encoder
                                has modules of the same names and no adapters
    adapter_model.safetensors   base_model.model.{module}.lora_A.weight [rank, in], .lora_B.weight [out, rank]
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_eagle.checkpoint import (
    checkpoint_folder,
    has_checkpoint,
    read_lora_config,
    read_model_config,
)
from megatron_eagle.checkpoint.manifest import verify_files
from megatron_eagle.config import load_yaml
from megatron_eagle.convert.checkpoint_files import CheckpointWeights
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.shards import DTYPES, save
from megatron_eagle.convert.whole_model import trained_type
from megatron_eagle.errors import UserError
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.presets import EagleConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Hugging Face's module -> the block it is in, and the model's adapter beside that block's fused layer.
_BESIDE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("self_attn", "self_attention.lora_qkv")),
    "o_proj": ("self_attn", "self_attention.lora_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("mlp", "mlp.lora_fc1")),
    "down_proj": ("mlp", "mlp.lora_fc2"),
}


class WeightReader(Protocol):
    """Where parameters come from, whole, by the model's names for them."""

    def read(self, name: str) -> Tensor: ...


def merged(
    tensors: Iterable[tuple[str, Tensor]], weights: WeightReader, model: EagleConfig, config: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """HF tensors of the base, with each adapted one W replaced by W + alpha / rank * B A, in fp32."""
    factors = {f"{module}.weight": pair for module, pair in _by_module(model, config).items()}
    odd = factors.keys() - ModelMapping(model, has_head=False).hf_shapes.keys()
    if odd:  # the table of names and the adapters have drifted apart: a fault of this code
        raise AssertionError(f"no Hugging Face tensor for the adapters of {sorted(odd)}")
    for name, tensor in tensors:
        if name in factors:
            a, b = (weights.read(factor).float() for factor in factors[name])
            tensor = tensor.float() + config.scale * (b @ a)
        yield name, tensor


def adapter_names(model: EagleConfig, config: LoraConfig) -> list[str]:
    """The adapters' parameters, by the model's names."""
    return [name for pair in _by_module(model, config).values() for name in pair]


def export_adapter(
    checkpoint: str | Path, folder: str | Path, *, base: str | Path | None = None, verify: bool = True
) -> list[str]:
    """Write the adapters of the latest weights in `checkpoint` into `folder`, as peft does. Earlier adapters
    there are replaced.

    Args:
        base: the Hugging Face folder of the model that they adapt, for peft to find it (`export_hf` with
            `merge=False` writes it); default: not named, for the checkpoint that the run started from.
        verify: read the checkpoint twice, first to compare every file with its manifest.

    Returns:
        Names of the files written.

    Raises:
        UserError: no checkpoint, or one without adapters; without `base`: parts besides the adapters were
            trained, or they were trained on other rotary positions than those of the model that the run
            started from; or `folder` holds something else than adapters.
    """
    checkpoint, target = Path(checkpoint), Path(folder)
    model_config, config = read_model_config(checkpoint), read_lora_config(checkpoint)
    if config is None:
        raise UserError(f"{checkpoint}: it has no LoRA adapters; export its weights with --hf alone")
    run = load_yaml(checkpoint_folder(checkpoint) / "run.yaml")
    others = _trained_besides(run)
    if others and base is None:
        raise UserError(
            f"{checkpoint}: {' and '.join(others)} trained besides the adapters, which therefore do not fit "
            "the model that the run started from; export their base too (--hf)"
        )
    if base is None and _moved(run, model_config):
        raise UserError(
            f"{checkpoint}: its model.text.rope_scaling is not that of the model that the run started from, "
            "which adapters cannot say; export their base too (--hf)"
        )
    if target.exists() and not (
        target.is_dir() and ((target / CONFIG).is_file() or not any(target.iterdir()))
    ):
        raise UserError(f"{target}: exists and holds no adapters; choose a new or empty folder")
    if verify:
        verify_files(checkpoint_folder(checkpoint))
    weights = CheckpointWeights(checkpoint)
    weights.check(ModelMapping(model_config, has_head=False), adapter_names(model_config, config))
    dtype = DTYPES[trained_type(checkpoint)]
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": weights.read(factor).to(dtype).contiguous()
        for module, pair in _by_module(model_config, config).items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    partial = target.parent / f".{target.name}.exporting"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir(parents=True)
        save(tensors, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(_peft_config(config, base), indent=2) + "\n")
        target.mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(partial / name, target / name)
    except OSError as error:
        raise UserError(f"{target}: cannot write here: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [CONFIG, WEIGHTS]


def _by_module(model: EagleConfig, config: LoraConfig) -> dict[str, tuple[str, str]]:
    """The model's names of A and B, by the Hugging Face module that they adapt."""
    found = {}
    for layer in range(model.text.num_hidden_layers):
        for target in config.target_modules:
            block, beside = _BESIDE[target]
            ours = f"language_model.decoder.layers.{layer}.{beside}.{target}"
            found[f"language_model.model.layers.{layer}.{block}.{target}"] = (f"{ours}_a", f"{ours}_b")
    return found


def _peft_config(config: LoraConfig, base: str | Path | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None if base is None else str(base),
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": 0.0,
        # One group, at the end: vLLM reads the names of the modules out of it.
        "target_modules": rf"language_model\.model\.layers\.\d+\.\w+\.({'|'.join(config.target_modules)})",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


def _trained_besides(run: dict[str, Any]) -> list[str]:
    """Parts whose own weights trained in the run of these settings."""
    optimizer = run.get("optimizer") or {}
    return [part for part in optimizer.get("trainable", []) if part != "language"]


def _moved(run: dict[str, Any], model: EagleConfig) -> bool:
    """Whether the run of these settings began with other rotary positions than `model`, its own; true, too,
    where that has YaRN and nobody can tell any more."""
    start = (run.get("checkpoint") or {}).get("load")
    scaling = model.text.rope_scaling
    if start is None or not has_checkpoint(start):
        return scaling is not None
    return read_model_config(start).text.rope_scaling != scaling

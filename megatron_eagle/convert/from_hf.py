"""Import: a Hugging Face folder becomes a Megatron checkpoint that any layout can load."""

import shutil
from pathlib import Path

import torch

from megatron_eagle.convert.checkpoint_files import pieces_of, write_checkpoint
from megatron_eagle.convert.hf_metadata import write_hf_metadata
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.pickled import open_weights
from megatron_eagle.convert.redundant import leave_out_redundant
from megatron_eagle.convert.shards import read_json
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.tiles import MEAN, STD
from megatron_eagle.model.presets import EagleConfig


def import_hf(hf: str | Path, checkpoint: str | Path, *, allow_pickle: bool = False) -> EagleConfig:
    """Read the Eagle 2.5 checkpoint in the folder `hf` into the new folder `checkpoint` (iteration 0).

    Every tensor is accounted for before anything is written: one that is missing, unexpected or of another
    shape is an error, and none keeps a random value. Weights are stored as bf16 if all of them are, else as
    fp32, which holds fp16 and bf16 exactly. One tensor at a time is in memory. The folder appears when it is
    complete.

    Args:
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors files.

    Returns:
        The model's configuration.

    Raises:
        UserError: `hf` is no complete Eagle 2.5 checkpoint, or `checkpoint` exists and is not empty.
    """
    source, target = Path(hf), Path(checkpoint)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected a Hugging Face checkpoint of Eagle 2.5")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; choose a new folder for the checkpoint")
    hf_config = read_json(source / "config.json")
    config = EagleConfig.from_hf(hf_config)
    _check_normalisation(source / "preprocessor_config.json")
    weights = open_weights(source, allow_pickle=allow_pickle)
    leave_out_redundant(weights)
    # transformers builds the pooling head unless told otherwise: without it there it would stay random.
    has_head = hf_config["vision_config"].get("vision_use_head", True)
    plan = ModelMapping(config, has_head=has_head)
    plan.check_hf(weights.shapes, str(source))

    dtype = torch.bfloat16 if set(weights.dtypes.values()) == {"BF16"} else torch.float32
    partial = target.parent / f".{target.name}.importing"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir(parents=True)
        write_hf_metadata(partial, source, weights, plan.passed_through)
        write_checkpoint(partial, config, pieces_of(plan, weights.read), dtype)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write here: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _check_normalisation(file: Path) -> None:
    """Training and export bring pixels to [-1, 1].

    Raises:
        UserError: the model took others.
    """
    settings = read_json(file) if file.is_file() else {}
    for name, ours in (("image_mean", list(MEAN)), ("image_std", list(STD))):
        if settings.get(name, ours) != ours:
            raise UserError(f"{file}: {name} is {settings[name]}; only {ours} is supported")

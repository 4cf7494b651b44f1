"""The whole model in one process: what converters and single-process inference work on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_eagle.checkpoint import checkpoint_folder
from megatron_eagle.config import load_yaml
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.lora import LoraConfig, add_lora
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.device import Device, detect_device
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel


@contextlib.contextmanager
def whole_model(
    config: EagleConfig, dtype: torch.dtype, lora: LoraConfig | None = None
) -> Iterator[tuple[EagleModel, Mesh, Device]]:
    """The model, unsplit, with parameters not yet set; process groups of one exist while it is entered.

    With `lora` it has these adapters, beside its own weights.

    A default process group that exists already is used and left as it is (every rank then holds the whole
    model and must enter together); otherwise a group of one is made, without any network port, and destroyed.
    Stay inside for everything that calls the model.

    Raises:
        UserError: this process already holds Megatron's model-parallel groups of another layout.
    """
    device = detect_device()
    with _group_of_one(device), device.context(), model_parallel(ParallelConfig()) as mesh:
        (model,) = build_model(config, mesh, device.torch_device, dtype)
        if lora is not None:
            add_lora([model], lora)
        yield model, mesh, device


def trained_type(checkpoint: str | Path) -> str:
    """safetensors' name of the type in which the run that wrote `checkpoint` trained."""
    training = load_yaml(checkpoint_folder(checkpoint) / "run.yaml").get("training") or {}
    return "BF16" if training.get("precision") == "bf16" else "F32"


@contextlib.contextmanager
def _group_of_one(device: Device) -> Iterator[None]:
    """Unlike `runtime.device.process_group` blind to a launcher's environment: a tool that is started on one
    rank of a job must not wait for the others."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # missing in torch's __all__
    torch.distributed.init_process_group(device.backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

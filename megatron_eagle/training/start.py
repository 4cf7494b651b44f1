"""The model of a run on this rank, with the weights that it starts from."""

from pathlib import Path

from megatron_eagle.checkpoint import load_checkpoint, read_lora_config
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.lora import add_lora
from megatron_eagle.model.parts import freeze
from megatron_eagle.runtime.device import Device
from megatron_eagle.runtime.parallel import Mesh
from megatron_eagle.training.run_config import RunConfig


def start_models(
    config: RunConfig,
    mesh: Mesh,
    device: Device,
    source: str | Path | None,
    *,
    load: bool,
    iteration: int | None = None,
) -> list[EagleModel]:
    """This rank's chunks, with the parts frozen that do not train, and with the run's adapters. Collective.

    Args:
        source: the checkpoint that they start from; None: fresh weights.
        load: whether its weights are read here, or later with the optimizer's state.
        iteration: of `source`; None: the latest.
    Raises:
        UserError: as `build_model` and `load_checkpoint`.
    """
    models = build_model(
        config.model, mesh, device.torch_device, config.training.dtype, config.recompute, config.layers
    )
    freeze(models, config.optimizer.trainable, config.optimizer.first_new_token)
    # Saved adapters are read with the weights; new ones go onto finished weights.
    has_adapters = source is not None and read_lora_config(source) is not None
    if config.lora is not None and has_adapters:
        add_lora(models, config.lora, seed=config.training.seed)
    if source is None:
        initialize_parameters(models, config.training.seed)
    elif load:
        load_checkpoint(source, models=models, verify_files=config.checkpoint.verify, iteration=iteration)
    if config.lora is not None and not has_adapters:
        add_lora(models, config.lora, seed=config.training.seed)
    return models

"""A run's processes: device and groups of this rank, its model, the weights that it starts from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eagle.checkpoint import load_checkpoint, read_lora_config
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.lora import add_lora
from megatron_eagle.model.parts import freeze
from megatron_eagle.runtime.determinism import set_deterministic
from megatron_eagle.runtime.device import Device, detect_device, process_group
from megatron_eagle.runtime.parallel import Mesh, model_parallel
from megatron_eagle.runtime.tp_overlap import tensor_parallel_buffers
from megatron_eagle.training.run_config import RunConfig

Initialize = Callable[[list[EagleModel], int], None]  # sets what the chunks have no weights for, from a seed


@contextmanager
def start_ranks(config: RunConfig) -> Iterator[tuple[Device, Mesh]]:
    """Device and groups of this rank for a run; at the end they are what they were. Collective."""
    device = detect_device()
    set_deterministic(config.training.seed, algorithms=config.training.deterministic)
    with (
        device.context(),
        process_group(device),
        model_parallel(config.layout, seed=config.training.seed) as mesh,
        tensor_parallel_buffers(
            config.layout.tp_comm_overlap,
            config.data.length // config.parallel.context_parallel_size,
            config.model.text.hidden_size,
            mesh.tp.size,
            config.layers.fp8 is not None,
        ),
    ):
        yield device, mesh


def start_models(
    config: RunConfig,
    mesh: Mesh,
    device: Device,
    source: str | Path | None,
    *,
    load: bool,
    iteration: int | None = None,
    initialize: Initialize = initialize_parameters,
) -> list[EagleModel]:
    """This rank's chunks, with the parts frozen that do not train, and with the run's adapters. Collective.

    Args:
        source: the checkpoint that they start from; None: fresh weights.
        load: whether its weights are read here, or later with the optimizer's state.
        iteration: of `source`; None: the latest.
        initialize: gives fresh weights their values.
    Raises:
        UserError: as `build_model` and `load_checkpoint`.
    """
    models = build_model(
        config.model, mesh, device.torch_device, config.training.dtype, config.recompute, config.layers
    )
    settings = config.optimizer
    freeze(models, settings.trainable, settings.first_new_token, settings.freeze_router)
    # Saved adapters are read with the weights; new ones go onto finished weights.
    has_adapters = source is not None and read_lora_config(source) is not None
    if config.lora is not None and has_adapters:
        add_lora(models, config.lora, seed=config.training.seed)
    if source is None:
        initialize(models, config.training.seed)
    elif load:
        load_checkpoint(source, models=models, verify_files=config.checkpoint.verify, iteration=iteration)
    if config.lora is not None and not has_adapters:
        add_lora(models, config.lora, seed=config.training.seed)
    return models

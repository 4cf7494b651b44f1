"""The whole model in one process: what converters and single-process inference work on."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.device import Device, detect_device
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel


@contextlib.contextmanager
def whole_model(config: EagleConfig, dtype: torch.dtype) -> Iterator[tuple[EagleModel, Mesh, Device]]:
    """The model, unsplit, with parameters not yet set; process groups of one exist while it is entered.

    A default process group that exists already is used and left as it is (every rank then holds the whole
    model and must enter together); otherwise a group of one is made, without any network port, and destroyed.
    Stay inside for everything that calls the model.

    Raises:
        UserError: this process already holds Megatron's model-parallel groups of another layout.
    """
    if parallel_state.model_parallel_is_initialized():
        raise UserError("a model-parallel layout is active in this process: use another process for this")
    device = detect_device()
    with _group_of_one(device), device.context(), model_parallel(ParallelConfig()) as mesh:
        (model,) = build_model(config, mesh, device.torch_device, dtype)
        yield model, mesh, device


@contextlib.contextmanager
def _group_of_one(device: Device) -> Iterator[None]:
    """Unlike `runtime.device.process_group` blind to a launcher's environment: a tool that is started on one
    rank of a job must not wait for the others."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(device.backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()

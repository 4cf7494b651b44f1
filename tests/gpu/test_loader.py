"""Pinned host memory and copies that nobody waits for: a GPU gets what the CPU gets."""

from dataclasses import fields, is_dataclass
from functools import partial

import pytest
import torch

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training.schedule import build_batch, plan_batch
from tests.parallel.store_cells import LENGTH, PACKS, model_for, write_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tensors(value) -> dict[str, torch.Tensor]:
    """All tensors of a dataclass and of the dataclasses in it."""
    found = {}
    for f in fields(value):
        member = getattr(value, f.name)
        if isinstance(member, torch.Tensor):
            found[f.name] = member
        elif is_dataclass(member):
            found |= {f"{f.name}.{name}": tensor for name, tensor in tensors(member).items()}
    return found


def test_batches_arrive_as_they_are(tmp_path):
    store = str(write_store(tmp_path))
    eagle, devices = model_for(store), {kind: Device(kind) for kind in ("cpu", "cuda")}
    built = {}
    with process_group(devices["cuda"]), model_parallel(ParallelConfig()) as mesh:
        for kind, device in devices.items():
            loader = PackLoader(
                DataConfig(store, LENGTH, decoder="exact"),
                global_batch_size=PACKS,
                data_parallel_rank=0,
                data_parallel_size=1,
                plan=partial(plan_batch, eagle, mesh, kind == "cuda"),
                device=device.torch_device,
            )
            packs = loader.step(0).microbatches
            held = [pack.pixel_values for pack in packs] + [pack.plan.token_index for pack in packs]
            assert all(tensor.is_pinned() == (kind == "cuda") for tensor in held if tensor.numel())
            built[kind] = [tensors(build_batch(device.torch_device, pack)) for pack in packs]
            loader.close()
    for on_cpu, on_gpu in zip(built["cpu"], built["cuda"], strict=True):
        assert on_cpu.keys() == on_gpu.keys() and len(on_cpu) > 6
        for name, tensor in on_gpu.items():
            assert torch.equal(tensor.cpu(), on_cpu[name]), name
        assert on_gpu["vision.pixel_values"].is_cuda and on_gpu["input_ids"].is_cuda

"""On a GPU: NCCL's communicators, and a layout's model, leave the device's memory with their layout."""

import gc

import pytest
import torch

from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.presets import preset
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def memory_in_use(device: torch.device) -> int:
    """Bytes, by whomever."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def test_a_layout_gives_back_the_devices_memory():
    device, eagle = Device("cuda"), preset("tiny").with_data(vocab_size=504, image_token_index=7)
    with process_group(device):
        used = []
        for _ in range(6):
            with model_parallel(ParallelConfig()) as mesh:
                models = build_model(eagle, mesh, device.torch_device)
                for axis in (mesh.tp, mesh.pp, mesh.cp, mesh.dp, mesh.dp_cp):
                    torch.distributed.all_reduce(torch.ones(1, device="cuda"), group=axis.group)
            del models
            used.append(memory_in_use(device.torch_device))
    assert used[-1] == used[1], "as after the second, when all kernels were loaded"

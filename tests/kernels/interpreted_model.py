"""A step of the tiny model on Triton kernels, interpreted: `python -m tests.kernels.interpreted_model`.

Prints, as JSON, the largest error over the loss and all gradients against the same step on eager twins with
Megatron's loss, and the kernels that ran. A process of its own with TRITON_INTERPRET=1.
"""

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from triton.runtime.interpreter import InterpretedFunction

from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.runtime.device import Device
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.cases import Outcome, combine, forward_backward, global_batch, tiny_model


def step(layers: LayersConfig) -> Outcome:
    """One pack, with pictures."""
    eagle = tiny_model()
    with model_parallel(ParallelConfig()) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"), layers=layers)
        initialize_parameters(models, seed=1)
        return combine([forward_backward(models, eagle, mesh, global_batch(eagle)[3:])])


def main() -> None:
    """One process, fp32."""
    torch.set_num_threads(1)
    ran, launch = set(), InterpretedFunction.__getitem__

    def record(kernel, grid):
        ran.add(f"{kernel.fn.__module__.rsplit('.', 1)[1]}.{kernel.fn.__name__}")
        return launch(kernel, grid)

    with tempfile.TemporaryDirectory() as folder, Device("cpu").context():
        store = f"file://{Path(folder, 'store')}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        eager = step(LayersConfig(kernels="eager", loss="plain"))
        with patch.object(InterpretedFunction, "__getitem__", record):
            triton = step(LayersConfig(kernels="triton", loss="fused"))
        torch.distributed.destroy_process_group()
    error, name = triton.worst(eager)
    print(json.dumps({"error": error, "worst": name, "kernels": sorted(ran)}))


if __name__ == "__main__":
    main()

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

from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.runtime.device import Device
from tests.parallel.cases import ONE_PROCESS, combine, run, tiny_model


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
        eager = run(ONE_PROCESS, tiny_model(), layers=LayersConfig(kernels="eager", loss="plain"))
        with patch.object(InterpretedFunction, "__getitem__", record):
            triton = run(ONE_PROCESS, tiny_model(), layers=LayersConfig(kernels="triton", loss="fused"))
        torch.distributed.destroy_process_group()
    error, name = combine([triton]).worst(combine([eager]))
    print(json.dumps({"error": error, "worst": name, "kernels": sorted(ran)}))


if __name__ == "__main__":
    main()

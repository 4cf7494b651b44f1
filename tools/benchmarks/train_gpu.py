"""Training on one GPU: model FLOPs utilisation and peak memory, with each memory feature on and off.

The model is Eagle2.5-8B cut in depth: full width, LAYERS layers of either model, so that weights
and optimizer states fit one device; FLOPs are counted for the cut model. Packs hold pictures, clips and text.
Each row is a run of its own with one feature changed against the row `all`: every feature that saves memory
without computing anything twice. MFU is against the GPU's dense bf16 peak, if runtime/gpus.py has it; times
are medians of the steps after the first SKIP. A row that does not fit says so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.report import REPO, Report, progress
from benchmarks.train import make_store

from megatron_eagle.config import save_yaml
from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.metrics import METRICS_FILE, read_steps

LENGTHS, LARGE = (8192, 32768), (65536,)
LAYERS, SKIP, STEPS = 6, 3, 10
TILE, PATCH = 448, 14
ALL = {
    "layers": {"loss": "fused", "loss_into_main_grad": True},
    "recompute": {"language": "none", "vision": "none", "swiglu": False},
}
# Name of the row -> what it changes.
FEATURES = {
    "all": {},
    "plain loss": {"layers.loss": "plain", "layers.loss_into_main_grad": "false"},
    "fused loss, own gradient": {"layers.loss_into_main_grad": "false"},
    "eager kernels": {"layers.kernels": "eager"},
    "recompute SwiGLU": {"recompute.swiglu": "true"},
    "recompute vision": {"recompute.vision": "full"},
    "recompute attention": {"recompute.language": "selective"},
    "recompute all layers": {"recompute.language": "full", "recompute.vision": "full"},
    "offload activations": {"recompute.language": "offload", "recompute.vision": "full"},
}


def run(large: bool = False) -> Report:
    """All features at all lengths, or at the `large` one, which nothing else goes with.

    Raises:
        UserError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("train_gpu needs a CUDA device; `bench.py train` measures on a CPU")
    rows = []
    for length in LARGE if large else LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            store = make_store(root, length=length, tile=TILE, patch=PATCH, samples=length // 64)
            config = root / "run.yaml"
            save_yaml(settings(store, length), config)
            for name, changes in FEATURES.items():
                progress(f"{length} tokens: {name}")
                rows.append({"tokens": length, "features": name, **_measure(config, root / name, changes)})
    title = f"Eagle2.5-8B with {LAYERS} + {LAYERS} layers, one pack a step, {torch.cuda.get_device_name()}"
    return Report(title, rows, "--large" if large else "")


def settings(store: Path, length: int) -> dict[str, Any]:
    """A run's settings but for the folder of its checkpoints, with the features of the row `all`."""
    depth = {"vision": {"num_hidden_layers": LAYERS}, "text": {"num_hidden_layers": LAYERS}}
    return {
        "model": {"preset": "eagle2.5-8b", "image_token_index": None, **depth},  # that of the made data
        "data": {"path": str(store), "length": length},
        "training": {"train_iterations": STEPS, "global_batch_size": 1, "precision": "bf16"},
        "logging": {"tensorboard": False, "progress": False},
        **ALL,
    }


def _measure(config: Path, folder: Path, changes: dict[str, str]) -> dict[str, Any]:
    overrides = [f"{name}={value}" for name, value in changes.items()]
    command = [sys.executable, str(REPO / "tools" / "train.py"), "run", "--config", str(config)]
    # The last checkpoint of each of the rows would be as large as the model's states: 1 TB in all.
    command += [f"checkpoint.path={folder}", "checkpoint.save=false", *overrides]
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    steps = read_steps(folder / "logs" / METRICS_FILE)[SKIP:]
    shutil.rmtree(folder, ignore_errors=True)
    if len(steps) < STEPS - SKIP:
        if "out of memory" in done.stderr.lower():
            return dict.fromkeys(("s a step", "MFU %", "of it vision", "peak GiB"), "out of memory")
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return {
        "s a step": median(step.seconds for step in steps),
        "MFU %": _percent(step.mfu for step in steps),
        "of it vision": _percent(step.mfu_vision for step in steps),
        "peak GiB": max(step.device_memory_gib or 0.0 for step in steps),
    }


def _percent(shares: Iterable[float | None]) -> float | str:
    known = [share for share in shares if share is not None]
    return 100 * median(known) if known else "-"

"""The rehearsed step beside the real one: peak memory, kernels, and how often the host waits, on one GPU.

`train rehearse` is judged here by what it was made in place of. The run is that of `train_gpu`'s first row:
Eagle2.5-8B cut in depth, packs of pictures, clips and text. One step after the warm-up is profiled; the same
step is then rehearsed from the same packs, on the CPU.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.report import REPO, Report, progress
from benchmarks.train import make_store
from benchmarks.train_gpu import LENGTHS, PATCH, SKIP, TILE, settings

from megatron_eagle.config import save_yaml
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.gpus import find_gpu
from megatron_eagle.training.monitoring.metrics import METRICS_FILE, read_steps
from megatron_eagle.training.monitoring.profiler import PROFILES

# How the report of `train rehearse` says it.
_REHEARSED = {
    "peak GB": r"peaks by rank: 0: ([\d.]+)",
    "kernels a step": r"read and written, (\d+) kernels",
    "waits of the host a microbatch": r"the host waits for the device ([\d.]+) times a microbatch",
    "waits of the host a step": r"times a microbatch and (\d+) times a step",
}
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run() -> Report:
    """Both, for the shortest length of `train_gpu`.

    Raises:
        UserError: there is no GPU, or one that runtime/gpus.py does not know.
    """
    if not torch.cuda.is_available():
        raise UserError("rehearsal needs a CUDA device: it compares a rehearsed step with a real one")
    name, length = torch.cuda.get_device_name(), LENGTHS[0]
    gpu = find_gpu(name)
    with tempfile.TemporaryDirectory() as folder:
        root, config = Path(folder), Path(folder) / "run.yaml"
        store = make_store(root, length=length, tile=TILE, patch=PATCH, samples=length // 64)
        save_yaml(settings(store, length), config)
        progress("the real step")
        real = _real(config, root / "run")
        progress("the rehearsed step")
        words = [
            "--config",
            str(config),
            "--gpus",
            "1",
            "--gpu",
            gpu.short,
            "--packs",
            "data",
            "--no-messages",
        ]
        rehearsed = read_rehearsal(_train(["rehearse", *words, f"checkpoint.path={root / 'rehearsed'}"]))
    title = f"a rehearsed step of {length} tokens beside the real one, {name}, torch {torch.__version__}"
    return Report(title, compare(rehearsed, real))


def read_rehearsal(report: str) -> dict[str, float]:
    """Figures in the printed report of `train rehearse`, of its first run.

    Raises:
        RuntimeError: one is not there.
    """
    found = {}
    for name, pattern in _REHEARSED.items():
        match = re.search(pattern, report)
        if match is None:
            raise RuntimeError(f"the rehearsal does not say its {name}:\n{report[-3000:]}")
        found[name] = float(match[1])
    step = found.pop("waits of the host a step") + found.pop("waits of the host a microbatch")
    return found | {"waits of the host": step}  # a step is one microbatch here


def count_events(trace: Mapping[str, Any]) -> dict[str, float]:
    """Kernels on the device and calls that wait for it, in a profiler's trace of one step."""
    events = trace["traceEvents"]
    return {
        "kernels a step": sum(event.get("cat") == "kernel" for event in events),
        "waits of the host": sum(event.get("name") in _WAITS for event in events),
    }


def compare(rehearsed: Mapping[str, float], real: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row for each figure that both have."""
    return [
        {
            "what": name,
            "rehearsed": value,
            "real": real[name],
            "rehearsed / real": value / real[name] if real[name] else "-",
        }
        for name, value in rehearsed.items()
    ]


def _real(config: Path, folder: Path) -> dict[str, float]:
    at = SKIP + 1
    words = [f"training.stop_at_iteration={at}", f"logging.profile={{start: {at}}}", "checkpoint.save=false"]
    _train(["run", "--config", str(config), f"checkpoint.path={folder}", *words])
    (file,) = (folder / "logs" / PROFILES).glob("*.json.gz")
    with gzip.open(file) as trace:
        counted = count_events(json.load(trace))
    steps = read_steps(folder / "logs" / METRICS_FILE)
    return counted | {"peak GB": max(step.device_memory_gib or 0.0 for step in steps) * 2**30 / 1e9}


def _train(words: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    command = [sys.executable, str(REPO / "tools" / "train.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode and "rehearse" not in words:  # whose problems are in its report
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr

"""Training: what our loop costs beside Megatron's bare schedule, and where a step's time goes. On CPUs.

overhead: between two iterations of the loop the same microbatches go through Megatron's schedule and the
optimizer alone, with the same model and optimizer (train_worker). The loop's side is everything else that
an iteration does: inputs to the device, totals, loss policy, logs, heartbeat. Loading is left out of both.
`overhead` is the median over pairs of loop / bare - 1; CPU time is that of the whole process.
split: milliseconds of a step by part, mean over steps and ranks (step_clock). Communication is the time in
collectives and in waiting for them, so it holds what ranks wait for each other.

The packs are real ones: pictures, clips and text made here, preprocessed and packed. `train_gpu` measures
memory and MFU on a GPU, `checkpoint` what saving costs.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.preprocess import make_input
from benchmarks.report import REPO, Report, progress

from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings

LENGTH, TILE, PATCH = 512, 64, 16
LARGE = {
    "vision": {"image_size": TILE, "patch_size": PATCH, "hidden_size": 128, "intermediate_size": 512},
    "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6},
}
MODELS: dict[str, dict[str, Any]] = {"tiny": {"preset": "tiny"}, "larger": LARGE}
LAYOUTS = {
    "one process": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "CP2": {"context_parallel_size": 2},
    "DP2": {},
}
SKIP = 2


def run() -> Report:
    """Overhead of both models, then the split of the tiny one under five layouts."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = make_store(root, length=LENGTH, tile=TILE, patch=PATCH, samples=120)
        rows = []
        for name, pairs in (("tiny", 30), ("larger", 14)):
            progress(f"overhead, {name} model: {pairs} pairs")
            settings = run_settings(root / f"pairs-{name}", store, MODELS[name], SKIP + pairs + 1)
            settings["data"]["prefetch"] = False  # nothing runs beside what is measured
            (found,) = measure(root, settings, "pairs", processes=1)
            rows.append({"what": "overhead", "model": name, "layout": "one process", **found})
        for layout, parallel in LAYOUTS.items():
            processes = 1 if layout == "one process" else 2
            progress(f"split, tiny model: {layout}")
            settings = run_settings(root / f"split-{layout}", store, MODELS["tiny"], SKIP + 4)
            settings["parallel"] = parallel
            ranks = measure(root, settings, "split", processes)
            parts = {part: fmean(rank[part] for rank in ranks) for part in ranks[0]}
            rows.append({"what": "split", "model": "tiny", "layout": layout, **parts})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    return Report("the training loop: overhead over Megatron's bare schedule, split of a step", rows)


def make_store(root: Path, *, length: int, tile: int, patch: int, samples: int) -> Path:
    """A packed token store of pictures, clips and text."""
    make_input(root, samples)
    sampling = SamplingSettings(2.0, 4, 16, 4, tile)
    settings = PreprocessSettings(str(root / "tokenizer"), (length,), sampling, patch)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        preprocess(root / "recipe.json", root / "store", settings, Execution(1))
    write_packs(root / "store", length, seed=0)
    return root / "store"


def run_settings(folder: Path, store: Path, model: dict[str, Any], iterations: int) -> dict[str, Any]:
    """A run.yaml's settings: two packs a step, no checkpoint but the last."""
    return {
        "model": model,
        "data": {"path": str(store), "length": LENGTH},
        "training": {"train_iterations": iterations, "global_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"path": str(folder)},
    }


def measure(root: Path, settings: dict[str, Any], mode: str, processes: int) -> list[dict[str, Any]]:
    """Run `train_worker` on so many processes; what each rank found."""
    job, result = root / "job.json", root / "result"
    job.write_text(json.dumps({"config": settings, "mode": mode, "skip": SKIP, "result": str(result)}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = [str(Path(__file__).with_name("train_worker.py")), str(job)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
    }
    command = [sys.executable, *(launcher if processes > 1 else []), *worker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return [json.loads(Path(f"{result}.{rank}").read_text()) for rank in range(processes)]

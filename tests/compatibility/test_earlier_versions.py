"""What earlier versions wrote still opens: stores, packs, run files, checkpoints, logs and exports."""

import importlib.util
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.training.monitoring.metrics import (
    METRICS_FILE,
    EvaluationMetrics,
    read_metrics,
    read_steps,
)
from megatron_eagle.training.monitoring.report import write_run_report
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.compatibility.make_fixture import archive, place
from tests.convert import ask_export

VERSIONS = ("0.1.0",)


@pytest.fixture(params=VERSIONS)
def earlier(request, tmp_path, monkeypatch) -> Iterator[Path]:
    """The artefacts of a version, to be written to; the working directory is there."""
    with tarfile.open(archive(request.param)) as packed:
        packed.extractall(tmp_path, filter="data")
    beside = tmp_path / "link"
    beside.symlink_to(tmp_path)
    os.replace(beside, place(request.param))  # tests in other processes do the same at any time
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    place(request.param).unlink(missing_ok=True)


def test_a_run_goes_on(earlier):
    """Store, packs, media, run file, checkpoint and logs: the losses with which its own version went on."""
    logs = earlier / "run" / "logs"
    before = (logs / METRICS_FILE).read_text().splitlines()
    train(load_run_config("run.yaml", world_size=1))
    expected = [json.loads(line) for line in (earlier / "expected.jsonl").read_text().splitlines()]
    steps = read_steps(logs / METRICS_FILE)
    assert [m.iteration for m in steps] == [record["iteration"] for record in expected]
    for step, record in zip(steps, expected, strict=True):
        for name in ("loss", "grad_norm", "lr", "tokens", "samples", "tiles", "frames"):
            assert getattr(step, name) == pytest.approx(record[name], rel=1e-5), (step.iteration, name)
    [evaluation] = [m for m in read_metrics(logs / METRICS_FILE) if isinstance(m, EvaluationMetrics)]
    assert evaluation.evaluation_loss == pytest.approx(expected[-1]["evaluation_loss"], rel=1e-5)
    assert (logs / METRICS_FILE).read_text().splitlines()[: len(before)] == before
    assert write_run_report(earlier / "run").is_file()


def test_an_export_cuts_pictures_as_training_does_now(earlier):
    code = earlier / "hf" / "image_processing_eagle2_5_vl.py"
    spec = importlib.util.spec_from_file_location("earlier_export", code)
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    random = np.random.default_rng(0)
    for k in range(2000):
        width, height = random.integers(1, 3000, 2).tolist()
        height = (height, width, 2 * width)[k % 3]  # squares and 1:2, where grids tie
        rule = {"max_tiles": k % 40 + 1, "tiling": ("iap", "aspect")[k // 40 % 2]}
        now = select_grid(width, height, tile_size=448, **rule)
        assert exported.select_grid(width, height, 448, **rule) == now, (width, height, rule)


def test_an_export_answers_as_one_made_now(earlier, monkeypatch):
    export_hf(earlier / "run", earlier / "now")
    found = {}
    for folder in ("hf", "now"):
        words = [folder, "media/wide.png", "media/clip.mp4", f"{folder}.safetensors"]
        monkeypatch.setattr("sys.argv", ["ask_export", *words])
        ask_export.main()
        found[folder] = load_file(earlier / f"{folder}.safetensors")
        weights = load_file(earlier / folder / "model.safetensors")
        found[folder] |= {f"weight {name}": tensor for name, tensor in weights.items()}
    assert found["hf"].keys() == found["now"].keys()
    for name, tensor in found["hf"].items():
        assert torch.equal(tensor, found["now"][name]), name

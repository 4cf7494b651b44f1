"""MFU only where the peak is known: the table of GPUs by exact name, and what a run takes and says of it."""

import contextlib
import io
import re

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.gpus import GPUS, find_gpu, known_gpu
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.monitoring.step_meter import choose_peak
from tests.parallel.harness import launch
from tests.training.test_training_loop import train_rank, write_run

CUDA = torch.device("cuda")


@pytest.fixture
def on(monkeypatch):
    """`on(NAME)`: what a run in one process chooses on a GPU of this name."""

    def choose(name, stated=None, precision="bf16"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        with process_group(Device("cpu")):
            return choose_peak(stated, precision, CUDA)

    return choose


# Dense bf16 TFLOP/s of the datasheets.
@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
    ],
)
def test_a_peak_by_exact_name(on, name, tflops):
    choice = on(name)
    assert choice.tflops == tflops
    assert choice.reason == f"MFU: of {tflops:g} TFLOP/s, dense bf16 of {name} (datasheet)"


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "nvidia h200",
        "NVIDIA H200 ",
        "h200",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA A100",
        "Tesla V100-SXM2-32GB",
        "",
    ],
)
def test_a_name_that_is_not_in_the_table_has_no_mfu(on, name):
    assert known_gpu(name) is None
    assert on(name).tflops is None
    assert on(name).reason == (
        f"no MFU: the peak of {name!r} is not known (runtime/gpus.py); "
        "logging.peak_tflops sets what it is measured against"
    )


def test_what_the_file_states_wins_and_fp32_has_no_known_peak(on):
    assert on("NVIDIA Unheard-of", stated=700).tflops == on("NVIDIA H200", 700, "fp32").tflops == 700
    assert on("NVIDIA H200", precision="fp32").tflops is None
    assert "computes in fp32" in on("NVIDIA H200", precision="fp32").reason


def choose_on_rank(names: list[str]) -> list:
    torch.cuda.get_device_name = lambda device: names[torch.distributed.get_rank()]
    choice = choose_peak(None, "bf16", CUDA)
    return [choice.tflops, choice.reason]


def test_a_job_of_several_kinds_of_gpus():
    one, other = launch(choose_on_rank, 2, ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"])
    assert one == other and one[0] == (989 + 756) / 2
    assert "NVIDIA H100 80GB HBM3 and NVIDIA H100 PCIe" in one[1]
    for choice in launch(choose_on_rank, 2, ["NVIDIA H200", "NVIDIA H2000"]):
        assert choice[0] is None and "'NVIDIA H2000' is not known" in choice[1]


def messages_on_rank(config: str, overrides: list[str]) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train_rank(config, 2, overrides)
    return said.getvalue()


def test_a_run_without_a_peak_says_so_once(tmp_path):
    write_run(tmp_path)
    config, logs = str(tmp_path / "run.yaml"), tmp_path / "run" / "logs" / "metrics.jsonl"
    first, second = launch(messages_on_rank, 2, config, ["training.stop_at_iteration=2"])
    assert re.findall("MFU.*", first) == [
        "MFU: a CPU has no known peak; logging.peak_tflops sets what it is measured against"
    ]
    assert "MFU" not in second
    assert [(step.mfu, step.mfu_vision, step.mfu_language) for step in read_metrics(logs)] == 2 * [
        3 * (None,)
    ]
    stated = ["training.stop_at_iteration=3", "logging.peak_tflops=0.5"]
    first, second = launch(messages_on_rank, 2, config, stated)
    assert "MFU: of 0.5 TFLOP/s, as logging.peak_tflops says" in first and "MFU" not in second
    last = read_metrics(logs)[-1]
    assert last.mfu == pytest.approx(last.tflops / 0.5) == last.mfu_vision + last.mfu_language > 0


def test_the_table_is_sound():
    names = [name for gpu in GPUS.values() for name in gpu.names]
    assert len(names) == len(set(names)) and all(find_gpu(name).short in GPUS for name in names)
    for short, gpu in GPUS.items():
        assert find_gpu(short) is find_gpu(short.upper()) is known_gpu(gpu.name) is gpu
        assert 50e12 < gpu.peak < 3e15 and 20e9 < gpu.memory < 300e9
        assert 300e9 <= gpu.bandwidth <= 8e12 and 30e9 < gpu.link < 1e12
    for short in ("h100", "h100-pcie", "h200", "b200", "a100", "l40s"):
        assert short in GPUS
    with pytest.raises(UserError, match="there is no GPU 'v100' in the table"):
        find_gpu("v100")

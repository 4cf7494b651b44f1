"""What `nvidia-smi` answers, in its documented format: of a healthy GPU, an ailing one, a slice, a game card.

Not yet compared with a GPU of our own: a program of that name answers here.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eagle.preflight.gpu_state import GpuState, parse_gpus, read_gpus
from megatron_eagle.problems import Problem

H100 = "0, GPU-1c3f0a52-9d0e-4b0a-8a53-6e1f7d2b9c10, NVIDIA H100 80GB HBM3, 535.129.03, Enabled, Enabled, 0, "
GAME = (
    "0, GPU-8fe3a97d-51f6-a669-0d80-b4530b81b816, NVIDIA GeForce RTX 3080, 470.57, Disabled, [N/A], [N/A], "
)
HEALTHY = GpuState(
    index=0,
    uuid="GPU-1c3f0a52-9d0e-4b0a-8a53-6e1f7d2b9c10",
    name="NVIDIA H100 80GB HBM3",
    driver="535.129.03",
    persistence=True,
    ecc=True,
    ecc_errors=0,
)


@pytest.mark.parametrize(
    ("bits", "slowdowns"),
    [
        ("0x0000000000000000", ()),
        ("0x0000000000000001", ()),  # at rest
        ("0x0000000000000004", ()),  # as much power as it may take
        ("0x0000000000000048", ("hardware slowdown", "thermal slowdown by hardware")),
        ("0x00000000000000A1", ("thermal slowdown by software", "power brake")),
        ("[N/A]", ()),
        ("[Not Supported]", ()),
    ],
)
def test_slowdowns(bits, slowdowns):
    assert parse_gpus(H100 + bits + "\n") == [replace(HEALTHY, slowdowns=slowdowns)]


def test_what_a_gpu_does_not_say():
    (gpu,) = parse_gpus(GAME + "0x0000000000000000\n\n")
    assert (gpu.persistence, gpu.ecc, gpu.ecc_errors) == (False, None, None)
    (slice_,) = parse_gpus(H100.replace("Enabled, 0,", "[N/A], [N/A],") + "[N/A]")
    assert slice_.ecc is None and slice_.ecc_errors is None
    (worn,) = parse_gpus(H100.replace("Enabled, 0,", "Enabled, 17,") + "0x0000000000000001")
    assert worn.ecc_errors == 17 and parse_gpus("") == []


@pytest.mark.parametrize("line", ["No devices were found", H100, H100 + "0x0, more", "x" + H100 + "0x0"])
def test_another_answer(line):
    with pytest.raises(Problem, match="answers in a way that is not known"):
        parse_gpus(line)


def program(folder: Path, text: str) -> str:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_asking(tmp_path):
    """The name of a field has changed; where a driver does not know the new one it is asked by the old."""
    answer = f"echo '{H100}0x0000000000000001'"
    assert read_gpus(program(tmp_path, answer)) == [HEALTHY]
    unknown = 'echo "Field \\"clocks_event_reasons.active\\" is not a valid field to query."; exit 2'
    older = program(tmp_path, f'case "$1" in *event_reasons*) {unknown};; esac\n{answer}')
    assert read_gpus(older) == [HEALTHY]
    neither = program(tmp_path, unknown)
    with pytest.raises(Problem, match="ended with status 2: Field .*is not a valid field to query"):
        read_gpus(neither)
    assert read_gpus(str(tmp_path / "absent")) == []
    lost = "Unable to determine the device handle for GPU0000:4F:00.0: Unknown Error"
    with pytest.raises(Problem, match=f"ended with status 9: {lost}"):
        read_gpus(program(tmp_path, f"echo '{lost}'; exit 9"))

"""Converting between Hugging Face and Megatron format: MB/s beside `cp`, peak memory beside its limit.

The model has random weights, the real widths of Eagle 2.5 8B in bf16, two language layers and four of the
encoder (`--large`: all of them). Each conversion is its own process and counts from its first read until
everything is on the disk; the source is in the page cache for all. Peak memory is the process's, with all it
imports; the limit is twice the largest shard and 1 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.report import Report, progress
from torch import Tensor

from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.shards import DTYPES, plan_shards, tensor_bytes, write_shards
from megatron_eagle.model.presets import EagleConfig, preset

SHARD_BYTES = 1_200_000_000
_CHILD = """
import json, sys, time
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
start = time.perf_counter()
{"import": import_hf, "export": export_hf}[sys.argv[1]](sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - start
with open("/proc/self/status") as status:
    [peak] = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
print(json.dumps({"seconds": seconds, "peak": 1024 * peak}))
"""


def model(large: bool) -> EagleConfig:
    """The 8B model, cut to two language layers and four vision layers unless `large`."""
    config = preset("eagle2.5-8b").complete()
    if not large:
        config.text.num_hidden_layers, config.vision.num_hidden_layers = 2, 4
    return config


def write_folder(folder: Path, config: EagleConfig) -> int:
    """A Hugging Face folder of random bf16 weights in shards; returns the bytes of the largest one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    shapes = ModelMapping(config, has_head=True).hf_shapes
    kinds = {name: ("BF16", shape) for name, shape in shapes.items()}
    sizes = {name: tensor_bytes(shape, "BF16") for name, shape in shapes.items()}
    write_shards(folder, _random(kinds), plan_shards(sizes, SHARD_BYTES), kinds)
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random(kinds: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor repeats a million random values of its own: drawing them all would take longest of all."""
    for name, (dtype, shape) in kinds.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(1_000_003, generator=generator).to(DTYPES[dtype])
        count = torch.Size(shape).numel()
        yield name, values.repeat(-(-count // len(values)))[:count].reshape(shape)


def _convert(direction: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, direction, str(source), str(target)]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    measured["seconds"] += _sync(target)
    return measured


def _copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - start + _sync(target)


def _sync(folder: Path) -> float:
    start = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - start


def _same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("model*.safetensors*"))
    return names == sorted(path.name for path in other.glob("model*.safetensors*")) and not any(
        subprocess.run(["cmp", "-s", str(one / name), str(other / name)]).returncode for name in names
    )


def run(large: bool = False) -> Report:
    """Import, export and copy one model."""
    config = model(large)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        progress("writing a model")
        largest = write_folder(root / "hf", config)
        total = sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors"))
        progress("cp")
        copied = _copy(root / "hf", root / "copy")
        progress("import")
        imported = _convert("import", root / "hf", root / "checkpoint")
        progress("export")
        exported = _convert("export", root / "checkpoint", root / "out")
        same = _same(root / "hf", root / "out")
    limit = 2 * largest + 1_000_000_000
    rows: list[dict[str, Any]] = [
        {"what": "cp", "s": copied, "MB/s": total / copied / 1e6, "peak MB": "-", "limit MB": "-"}
    ]
    for what, measured in (("import", imported), ("export", exported)):
        rate, peak = total / measured["seconds"] / 1e6, round(measured["peak"] / 1e6)
        row = {"what": what, "s": measured["seconds"], "MB/s": rate, "peak MB": peak}
        rows.append({**row, "limit MB": round(limit / 1e6)})
    rows[-1]["what"] = "export (bit-equal)" if same else "export (NOT bit-equal)"
    depth = f"{config.text.num_hidden_layers} language and {config.vision.num_hidden_layers} vision layers"
    title = f"{total / 1e9:.2f} GB of bf16, {depth} of 8B widths, largest shard {largest / 1e9:.2f} GB"
    return Report(title, rows, "--large" if large else "")

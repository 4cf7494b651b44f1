"""List the parallel layouts of N GPUs for a run, fastest first, with memory by part. Needs no GPU.

%(prog)s --config run.yaml --gpus 64 --gpu h200           or --preset NAME
%(prog)s --serve LENGTH --hf H [--frames N] [--gpu h200]  what a served prompt takes: or --preset, --config
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError

_REHEARSED = 3  # layouts of `--rehearse`


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    arguments = build_parser(prog).parse_args(argv)
    if arguments.serve is not None:
        _serve(arguments)
        return
    if arguments.hf is not None or arguments.gpus is None or arguments.gpu is None:
        raise UserError(
            "a training is planned with --config or --preset, --gpus and --gpu; --hf is for --serve"
        )

    from megatron_eagle.planning.plan_report import as_records, render_plan
    from megatron_eagle.planning.planner import PackShape, file_run, plan_layouts, preset_run
    from megatron_eagle.planning.rates import Machine, describe_rates
    from megatron_eagle.planning.sequences import render_sequences, sequence_plans, sequence_records
    from megatron_eagle.rehearsal.gpu_types import find_gpu_type
    from megatron_eagle.rehearsal.of_plan import rehearse_plans
    from megatron_eagle.runtime.gpus import find_gpu

    for name in ("tiles", "gpus_per_node", "top"):
        value = getattr(arguments, name)
        if value is not None and value < (0 if name == "tiles" else 1):
            raise UserError(f"--{name.replace('_', '-')} is {value}: too small")
    gpu = find_gpu(arguments.gpu)
    memory = gpu.memory if arguments.gpu_memory is None else arguments.gpu_memory * 1e9
    if arguments.preset:
        config = preset_run(
            arguments.preset, arguments.length, arguments.global_batch_size, arguments.overrides
        )
        packs = PackShape.assumed(config.data.length, config.model.tokens_per_tile, arguments.tiles)
    else:
        config = file_run(arguments.config, arguments.overrides)
        packs = PackShape.of_data(config.data)
        if arguments.tiles is not None:
            packs = packs.with_tiles(arguments.tiles)
    if arguments.rehearse:
        find_gpu_type(arguments.gpu)
        if arguments.tiles is not None:
            raise UserError("--rehearse takes the data's tiles, or made-up packs: leave out --tiles")
    machine = Machine.of(gpu, arguments.gpus_per_node, config.layers.attention)
    plans = plan_layouts(config, arguments.gpus, memory, packs, machine)
    sequences = sequence_plans(config, plans.legal[0], arguments.gpus, packs, machine)
    if arguments.json:
        found = as_records(plans, config) | {"packs_per_sequence": sequence_records(sequences)}
        _write(arguments.json, found)
    top = len(plans.legal) if arguments.all else arguments.top
    gpus = f"{arguments.gpus} x {gpu.name} with {memory / 1e9:g} GB"
    rates = describe_rates(machine, gpu, config.layers.attention)
    print(render_plan(plans, config, packs, gpus, rates, top=top, refusals=arguments.all))
    print(f"\n{render_sequences(sequences)}")
    if arguments.rehearse:
        print("\nrehearsed:", flush=True)
        first, data = (plans.fitting or plans.legal)[:_REHEARSED], arguments.config is not None
        for line in rehearse_plans(first, config, arguments.gpu, arguments.gpus, data=data):
            print(line, flush=True)


def _serve(arguments: argparse.Namespace) -> None:
    from megatron_eagle.convert.shards import read_json
    from megatron_eagle.model.presets import EagleConfig
    from megatron_eagle.planning.planner import file_run, preset_run
    from megatron_eagle.planning.serving_memory import ServedPrompt, render_serving, serving_record
    from megatron_eagle.runtime.gpus import find_gpu

    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", arguments.frame_size)
    if found is None:
        raise UserError(f"--frame-size {arguments.frame_size}: expected WIDTHxHEIGHT, as 1920x1080")
    for name in ("serve", "frames", "tiles"):
        value = getattr(arguments, name)
        if value is not None and value < (1 if name == "serve" else 0):
            raise UserError(f"--{name} is {value}: too small")
    if arguments.hf is not None:
        eagle = EagleConfig.from_hf(read_json(arguments.hf / "config.json"))
    elif arguments.preset:
        eagle = preset_run(arguments.preset, arguments.serve, 1, arguments.overrides).model
    else:
        eagle = file_run(arguments.config, arguments.overrides).model
    tiles = arguments.frames if arguments.tiles is None else arguments.tiles
    width, height = map(int, found.groups())
    frames = min(arguments.frames, tiles)
    prompt = ServedPrompt(arguments.serve, tiles, frames, width, height, arguments.kv_bytes)
    print(render_serving(eagle, prompt, find_gpu(arguments.gpu) if arguments.gpu else None))
    if arguments.json:
        _write(arguments.json, serving_record(eagle, prompt))


def _write(path: str, found: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write here: {error.strerror}") from error


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="the run's YAML file; its data decides the packs")
    source.add_argument("--preset", metavar="NAME", help="a model preset, without data")
    source.add_argument("--hf", type=Path, metavar="H", help="an exported folder, with --serve")
    parser.add_argument("--gpus", type=int, metavar="N", help="of a training")
    parser.add_argument(
        "--gpu", metavar="NAME", help="h100, h200, a100, ... or CUDA's name (runtime/gpus.py)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one GPU, 10^9 bytes (default: the GPU's own)"
    )
    parser.add_argument("--length", type=int, default=32768, help="tokens per pack, with --preset (32768)")
    parser.add_argument(
        "--global-batch-size", type=int, default=64, help="packs per step, with --preset (64)"
    )
    parser.add_argument("--tiles", type=int, help="tiles per pack; else the data's, or half of the tokens")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that NVLink joins (8)")
    parser.add_argument("--top", type=int, default=10, help="layouts to print (10)")
    parser.add_argument(
        "--all", action="store_true", help="print every layout and every reason for a refusal"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="then rehearse the first three on this CPU (`train rehearse`): their peak memory and step",
    )
    parser.add_argument(
        "--serve", type=int, metavar="LENGTH", help="plan a served prompt of so many tokens with its answer"
    )
    parser.add_argument("--frames", type=int, default=256, metavar="N", help="of it, a tile each (256)")
    parser.add_argument(
        "--frame-size", default="1920x1080", metavar="WxH", help="pixels of a frame in its file (1920x1080)"
    )
    parser.add_argument(
        "--kv-bytes", type=int, default=2, choices=(1, 2, 4), help="of an element of its KV cache (2; fp8: 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every layout with all its numbers")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file's")
    return parser

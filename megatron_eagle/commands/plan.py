"""List the parallel layouts of N GPUs for a run, fastest first, with memory by part. Needs no GPU."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.errors import UserError

_REHEARSED = 3  # layouts of `--rehearse`


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    arguments = build_parser(prog).parse_args(argv)

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
        try:
            found = as_records(plans, config) | {"packs_per_sequence": sequence_records(sequences)}
            records = json.dumps(found, indent=1)
            Path(arguments.json).write_text(records + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{arguments.json}: cannot write here: {error.strerror}") from error
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


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="the run's YAML file; its data decides the packs")
    source.add_argument("--preset", metavar="NAME", help="a model preset, without data")
    parser.add_argument("--gpus", required=True, type=int, metavar="N")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help="h100, h200, a100, ... or CUDA's name (runtime/gpus.py)"
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
    parser.add_argument("--json", metavar="FILE", help="write every layout with all its numbers")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file's")
    return parser

"""`train rehearse`: the step of a whole cluster on one CPU, before anybody waits for its GPUs."""

import argparse
import os
from pathlib import Path

from megatron_eagle.errors import UserError


def add_rehearse(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Its options."""
    parser = commands.add_parser(
        "rehearse",
        help="run a job's distinct ranks on GPUs that are not there, and match their messages",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run's file, or one of stages")
    add("--stage", metavar="NAME", help="only this stage of a file (default: all)")
    add("--gpus", required=True, type=int, metavar="N", help="of the job, on all nodes")
    add("--gpu", required=True, metavar="NAME", help="h100, h100-pcie, h200, b200, a100 or l40s")
    add(
        "--packs",
        choices=("made-up", "data"),
        default="made-up",
        help="packs of one document, of many, without a picture and with most tiles; or the data's (made-up)",
    )
    add("--preset", metavar="NAME", help="with made-up packs: the model, where it is a checkpoint's")
    add("--ranks", metavar="R,R,...", help="these at full depth (default: the distinct ones)")
    add(
        "--microbatches",
        type=int,
        metavar="N",
        help="of a step (default: 2, or 2 for each stage)",
    )
    add("--no-messages", action="store_true", help="do not match the ranks' messages")
    add(
        "--timeline",
        metavar="FILE",
        help="predict when everything of a step runs: a trace for Perfetto, a FILE for each stage",
    )
    add("--processes", type=int, metavar="N", help="at a time (default: the machine's cores)")
    add("overrides", nargs="*", metavar="a.b=c", help="settings in place of the file's")


def run_rehearse(arguments: argparse.Namespace) -> int:
    """Rehearse each run of the file; 1 where one has a problem."""
    from megatron_eagle.rehearsal.gpu_types import find_gpu_type
    from megatron_eagle.rehearsal.packs import UnreadPacks
    from megatron_eagle.rehearsal.rehearsal import RehearsalPlan, rehearse
    from megatron_eagle.rehearsal.report import render
    from megatron_eagle.rehearsal.settings import read_runs, read_runs_without_data
    from megatron_eagle.rehearsal.timeline_report import predict, write_trace

    for name in ("gpus", "microbatches", "processes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: must be at least 1")
    find_gpu_type(arguments.gpu)
    if arguments.timeline is not None:
        if not Path(arguments.timeline).parent.is_dir():
            raise UserError(f"--timeline {arguments.timeline}: there is no such folder")
        if Path(arguments.timeline).is_dir():
            raise UserError(f"--timeline {arguments.timeline}: is a folder; name a file")
    ranks = _ranks(arguments.ranks)
    made_up = arguments.packs == "made-up"
    if arguments.preset is not None and not made_up:
        raise UserError("--preset is for made-up packs: data belong to the model of the file")
    common = {"stage": arguments.stage, "gpus": arguments.gpus}
    if made_up:
        runs = read_runs_without_data(
            arguments.config, arguments.overrides, preset=arguments.preset, **common
        )
    else:
        runs = read_runs(arguments.config, arguments.overrides, **common)
    plans = {
        name: RehearsalPlan.of(
            config,
            arguments.gpu,
            arguments.gpus,
            ranks=ranks,
            microbatches=arguments.microbatches,
            open_loader=None if made_up else UnreadPacks,
            timeline=arguments.timeline is not None,
        )
        for name, config in runs.items()
    }
    problems = 0
    for name, plan in plans.items():
        processes = arguments.processes or os.cpu_count() or 1
        found = rehearse(plan, processes, messages=not arguments.no_messages, tell=print)
        print(render(name, found))
        if arguments.timeline is not None and (prediction := predict(found)) is not None:
            print("\n".join(prediction.lines()))
            path = Path(arguments.timeline)
            write_trace(
                prediction.timelines, path.with_stem(f"{path.stem}-{name}") if len(runs) > 1 else path
            )
        problems += found.problems
    return 1 if problems else 0


def _ranks(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--ranks {text}: expected numbers with commas between them") from None

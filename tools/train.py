"""Train Eagle 2.5: `torchrun --nproc-per-node N tools/train.py run --config FILE [a.b=c ...]`; watch it."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from megatron_eagle.errors import UserError, run_cli


def main() -> int | None:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, or resume where the checkpoint folder stands")
    check = commands.add_parser("check", help="look at settings, data and folders, without training")
    for command in (run, check):
        command.add_argument(
            "--config", required=True, metavar="FILE", help="the run's file, or one of stages"
        )
        command.add_argument("--stage", metavar="NAME", help="only this stage of a file (default: all)")
        command.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings in place of the file's")
    check.add_argument("--processes", type=int, required=True, metavar="N", help="of the job, on all nodes")
    report = commands.add_parser("report", help="draw a run's logs into one HTML file")
    report.add_argument("run", metavar="RUN", help="a run's folder of checkpoints, or of logs")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run's logs")
    status = commands.add_parser("status", help="where each rank of a run stands, and who is behind")
    status.add_argument("run", metavar="RUN", help="a run's folder of checkpoints, or of logs")
    arguments = parser.parse_args()
    if arguments.command == "report":
        return _report(arguments.run, arguments.output)
    if arguments.command == "status":
        return _status(arguments.run)
    if arguments.command == "check":
        return _check(arguments)
    return _run(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from megatron_eagle.training.preflight import check_runs
    from megatron_eagle.training.stages import load_stages

    configs = load_stages(
        arguments.config, arguments.overrides, stage=arguments.stage, world_size=arguments.processes
    )
    print(*check_runs(configs, arguments.processes), sep="\n")
    return 0


def _report(run: str, output: str | None) -> int:
    from megatron_eagle.training.report import write_report

    print(write_report(run, output))
    return 0


def _status(run: str) -> int:
    from megatron_eagle.training.heartbeat import FOLDER, status

    logs = Path(run, "logs")
    print(status(logs if (logs / FOLDER).is_dir() else Path(run)))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    # Libraries announce what is not installed (Apex, TransformerEngine) and what will be renamed, per rank.
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from megatron_eagle.training.agreement import AgreedError
    from megatron_eagle.training.resilience import EXIT_REQUEUE, Preempted
    from megatron_eagle.training.stages import load_stages, train_stages

    started = False
    try:
        configs = load_stages(arguments.config, arguments.overrides, stage=arguments.stage)
        started = True
        train_stages(configs)
    except Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; start again to go on (status {EXIT_REQUEUE})", file=sys.stderr)
        return EXIT_REQUEUE
    except UserError as error:
        # Every rank reads the same configuration and raises the same agreed errors: one of them prints.
        if os.environ.get("RANK", "0") != "0" and (not started or isinstance(error, AgreedError)):
            return 2
        raise
    return 0


if __name__ == "__main__":
    run_cli(main)

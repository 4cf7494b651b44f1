"""Train Eagle 2.5: `torchrun --nproc-per-node N tools/train.py run --config FILE [a.b=c ...]`."""

import argparse
import os
import sys
import warnings

from megatron_eagle.errors import UserError, run_cli


def main() -> int | None:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, or resume where the checkpoint folder stands")
    run.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file, or one of stages")
    run.add_argument("--stage", metavar="NAME", help="only this stage of a file of stages (default: all)")
    run.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file's")
    arguments = parser.parse_args()

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

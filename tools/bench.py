"""Measure one thing beside its peers in the same run: `bench.py NAME [options] [--json FILE]`."""

import argparse
import importlib
import inspect

import torch
from benchmarks.report import write_json

from megatron_eagle.errors import UserError, run_cli

BENCHMARKS = (
    "activation_offload",
    "attention",
    "checkpoint",
    "context_layouts",
    "context_parallel",
    "convert",
    "dali",
    "kernels",
    "linear_ce",
    "loader",
    "long_video",
    "packing",
    "planner",
    "prefill",
    "preprocess",
    "rehearsal",
    "rehearsal_qwen3",
    "rehearsal_sweep",
    "selection",
    "store",
    "tiles",
    "transcode",
    "train",
    "train_gpu",
    "video",
)


def main() -> None:
    """Run the benchmark NAME, print its table, and write its card to FILE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers with commit, machine and date")
    parser.add_argument(
        "--large", action="store_true", help="also the sizes that take minutes or much memory"
    )
    parser.add_argument("--packs", metavar="DIR", help="a store's length folder, instead of made-up packs")
    parser.add_argument("--clips", metavar="DIR", help="where videos are kept, instead of making them anew")
    parser.add_argument("--plot", metavar="FILE", help="draw the numbers, as PNG")
    parser.add_argument("--kept", metavar="DIR", help="where cases that are done are kept and found again")
    parser.add_argument("--case", metavar="TEXT", help="only cases with this in their names")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where, if there is a choice (cpu)")
    arguments = parser.parse_args()
    run = importlib.import_module(f"benchmarks.{arguments.name}").run
    names = ("large", "packs", "clips", "plot", "kept", "case", "device")
    options = {name: value for name in names if (value := getattr(arguments, name))}
    for name in options.keys() - inspect.signature(run).parameters.keys():
        raise UserError(f"{arguments.name} takes no --{name}; leave it out")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here")
    report = run(**options)
    print(report.table())
    if arguments.json:
        write_json(report, arguments.name, arguments.json)


if __name__ == "__main__":
    run_cli(main)

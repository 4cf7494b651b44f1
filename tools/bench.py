"""Measure one thing beside its peers in the same run: `bench.py NAME [--large] [--json FILE]`."""

import argparse
import importlib
import inspect

from benchmarks.report import write_json

from megatron_eagle.errors import UserError, run_cli

BENCHMARKS = ("packing", "tiles")


def main() -> None:
    """Run the benchmark NAME, print its table, and write its card to FILE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers with commit, machine and date")
    parser.add_argument(
        "--large", action="store_true", help="also the sizes that take minutes or much memory"
    )
    arguments = parser.parse_args()
    run = importlib.import_module(f"benchmarks.{arguments.name}").run
    if arguments.large and "large" not in inspect.signature(run).parameters:
        raise UserError(f"{arguments.name} has no larger sizes; leave out --large")
    report = run(**({"large": True} if arguments.large else {}))
    print(report.table())
    if arguments.json:
        write_json(report, arguments.name, arguments.json)


if __name__ == "__main__":
    run_cli(main)

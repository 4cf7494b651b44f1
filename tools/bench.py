"""Measure one thing beside its peers in the same run: `bench.py NAME [--json FILE]`."""

import argparse
import importlib

from benchmarks.report import write_json

from megatron_eagle.errors import run_cli

BENCHMARKS = ("packing", "tiles")


def main() -> None:
    """Run the benchmark NAME, print its table, and write its card to FILE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers with commit, machine and date")
    arguments = parser.parse_args()
    report = importlib.import_module(f"benchmarks.{arguments.name}").run()
    print(report.table())
    if arguments.json:
        write_json(report, arguments.name, arguments.json)


if __name__ == "__main__":
    run_cli(main)

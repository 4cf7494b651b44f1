"""Is this the base that base.toml tells of, and is all of it new enough?  The first RUN of the Dockerfile.

It runs before anything of this project is there, and imports nothing but what every such image has.
"""

import sys
import tomllib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

TABLE = Path(__file__).with_name("base.toml")


def main() -> int:
    """Print every version, and each fault in a line; returns the exit status."""
    lines, faults = compare(tomllib.loads(TABLE.read_text(encoding="utf-8"))["versions"], find)
    print(*lines, sep="\n")
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


def compare(
    table: Mapping[str, Mapping[str, Any]], find: Callable[[str, Mapping[str, Any]], str | None]
) -> tuple[list[str], list[str]]:
    """What is here beside what the table tells, and what is missing or too old, a line each.

    Only what has a minimum may be at fault; the others are told of.
    """
    lines, faults = [], []
    for name, row in table.items():
        found, told, minimum = find(name, row), row["version"], row.get("minimum")
        lines.append(f"{name}: {found or 'not here'}; base.toml tells of {told} ({row['source']})")
        if minimum is None:
            continue
        if found is None:
            faults.append(f"{name} is not in this base: {row['why']} needs {minimum}; choose another BASE")
        elif Version(found).release < Version(minimum).release:
            faults.append(f"{name} is {found}: {row['why']} needs {minimum}; choose a newer BASE")
    return lines, faults


def find(name: str, row: Mapping[str, Any]) -> str | None:
    """The version that is installed here, or None."""
    if name == "python":
        return ".".join(map(str, sys.version_info[:3]))
    if name == "cuda":
        import torch

        cuda: str | None = torch.version.cuda
        return cuda
    for package in row.get("names", [name]):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


if __name__ == "__main__":
    sys.exit(main())

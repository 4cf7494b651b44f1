"""mypy's errors against those that are still allowed: the list only gets shorter.

`python -m tests.project.types` checks, as `make lint` does. types_baseline.json counts, by file and mypy's
code, what is left of the time before types were checked; whatever does not stand there is held to `strict`.
An error more fails, and so does one fewer until `--write` takes it off the list.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASELINE = Path(__file__).with_name("types_baseline.json")

Counts = dict[str, dict[str, int]]
"""Errors by file and mypy's code."""


@dataclass(frozen=True)
class Finding:
    """One error of mypy."""

    file: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}  [{self.code}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, or shrink the list; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.project.types", description=__doc__)
    parser.add_argument("--write", action="store_true", help="take what is mended off the list")
    options = parser.parse_args(arguments)
    allowed: Counts = json.loads(BASELINE.read_text(encoding="utf-8"))
    findings = run_mypy()
    found = count(findings)
    new = beyond(found, allowed)
    for finding in findings:
        if finding.code in new.get(finding.file, {}):
            print(finding)
    if new:
        for file, codes in new.items():
            for code, number in codes.items():
                print(f"{file}: {number} [{code}] beyond the {allowed.get(file, {}).get(code, 0)} allowed")
        return 1
    mended = total(allowed) - total(found)
    if mended and not options.write:
        print(
            f"{mended} errors less than allowed: `python -m tests.project.types --write`, and commit the list"
        )
        return 1
    if options.write:
        BASELINE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"types: {total(found)} old errors in {len(found)} files, no new one")
    return 0


def run_mypy(arguments: Sequence[str] = ()) -> list[Finding]:
    """What mypy finds with the project's configuration, in the given files or in all that are checked.

    Raises:
        SystemExit: mypy itself failed.
    """
    command = [sys.executable, "-m", "mypy", "--output", "json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or done.stderr:
        raise SystemExit(f"mypy failed:\n{done.stdout}{done.stderr}")
    return read_reports(done.stdout)


def read_reports(output: str) -> list[Finding]:
    """The errors in what mypy writes: an object a line, and an empty line where it has none."""
    reports = [json.loads(line) for line in output.splitlines() if line]
    return [
        Finding(report["file"], report["line"], report["code"], report["message"])
        for report in reports
        if report["severity"] == "error"
    ]


def count(findings: Sequence[Finding]) -> Counts:
    """Findings by file and code."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for finding in findings:
        counts[finding.file][finding.code] += 1
    return {file: dict(codes) for file, codes in counts.items()}


def beyond(found: Mapping[str, Mapping[str, int]], allowed: Mapping[str, Mapping[str, int]]) -> Counts:
    """How many errors of a kind a file has more than allowed."""
    more = {file: Counter(codes) - Counter(allowed.get(file, {})) for file, codes in found.items()}
    return {file: dict(codes) for file, codes in more.items() if codes}


def total(counts: Mapping[str, Mapping[str, int]]) -> int:
    """All errors of a count."""
    return sum(sum(codes.values()) for codes in counts.values())


if __name__ == "__main__":
    sys.exit(main())

"""Settings of the whole test run, and what its parts took."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

# Shared machines stall: a slow example is no failure. The same examples every time keep CI reproducible.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# What a test module names that starts ranks or jobs of its own.
_STARTERS = ("harness", "torchrun", "distributed.run", "tests.checkpoint.steps")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A line for each part of the run: its tests and their minutes, most of them first."""
    parts: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                path = config.rootpath / report.nodeid.split("::")[0]
                part = "with ranks" if _starts_ranks(path) else path.relative_to(config.rootpath).parts[1]
                tests, seconds = parts.setdefault(part, [0, 0.0])
                parts[part] = [tests + (report.when == "call"), seconds + report.duration]
    for part, (tests, seconds) in sorted(parts.items(), key=lambda item: -item[1][1]):
        terminalreporter.write_line(f"{part:<18}{tests:5} tests {seconds / 60:6.1f} min")


@cache
def _starts_ranks(path: Path) -> bool:
    source = path.read_text(encoding="utf-8")
    return any(name in source for name in _STARTERS)

"""Settings of the whole test run, which tests may run side by side, and what the run's parts took."""

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Shared machines stall: a slow example is no failure. The same examples every time keep CI reproducible.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# What a test module names that starts ranks or jobs of its own.
_STARTERS = ("harness", "torchrun", "distributed.run", "tests.checkpoint.steps")
_THREADS = 150  # of about three layouts: groups have 48


class OneAfterAnother(LoadFileScheduling):
    """With several workers (`-n`): a file stays together, for what it makes once, and all files that start
    ranks are one worker's, because ranks that wait for a core time out.

    Marks of groups cannot say it: xdist 3.8 writes them where pytest 9.2 does not look any more.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "with ranks" if _starts_ranks(self.config.rootpath / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneAfterAnother:
    return OneAfterAnother(config, log)


@pytest.fixture(autouse=True)
def groups_end() -> Iterator[None]:
    """Ends what training in this process leaves: models hold themselves in circles, and with them the threads
    of their groups, which wake 100 times a second. Hundreds keep a machine busy until Python happens to look.
    """
    yield
    if len(os.listdir("/proc/self/task")) > _THREADS:
        gc.collect()


@pytest.fixture(autouse=True)
def priority_is_put_back() -> Iterator[None]:
    """libsvtav1 makes the thread that encodes with it a real-time one, where root calls it: from then on no
    other process has that core, until this one waits."""
    yield
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and not _starts_ranks(item.path):
        _give_way()


@cache
def _give_way() -> None:
    """Ranks of another worker wait for each other: one that has no core keeps all of them busy."""
    os.nice(5)


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

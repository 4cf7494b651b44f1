"""Which tests run which call sites of collectives and which scale factors: one run of the tests, recorded.

Fixtures that several tests share are recorded by themselves. Ranks leave what they ran in a folder; their
server is changed once, before they are forked from it.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mutants import factors
from tests.mutants.collectives import heard
from tests.mutants.mutant import ranks_by
from tests.mutants.sites import caller, current_phase
from tests.parallel import harness


class Record:
    """What a process ran: (kind, site, phase), each only once. A candidate without floating-point results is
    an `integer`."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str, str]] = set()
        self._callers: set[tuple] = set()

    def collective(self, site: str) -> None:
        self.seen.add(("collective", site, site.split(":")[0]))

    def factor(self, site: str, is_floating: bool) -> None:
        frame = caller(2)  # of the code that has the factor
        key = site, is_floating, frame.f_code, frame.f_back and frame.f_back.f_code
        if key not in self._callers:
            self._callers.add(key)
            self.seen.add(("factor" if is_floating else "integer", site, current_phase(frame)))

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{os.getpid()}.json").write_text(json.dumps(sorted(self.seen)))


class Recorder:
    """The pytest plugin. Afterwards `result` has

    tests: seconds and shared fixtures of each; fixtures: seconds of each; sites: [kind, site, phase] by test
    or fixture; failed: tests that did not pass.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._record, self._owners, self._nested = folder, Record(), [], [0.0]
        self.result = {"tests": {}, "fixtures": {}, "sites": {}, "failed": []}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around pytest's run."""
        with heard(self._record.collective):
            yield
        for owner in self._owners:
            rows = {
                tuple(row) for file in self._of(owner).glob("*.json") for row in json.loads(file.read_text())
            }
            self.result["sites"][owner] = sorted(rows)

    def _of(self, owner: str) -> Path:
        return self._folder / str(self._owners.index(owner))

    @contextlib.contextmanager
    def _owned(self, owner: str) -> Iterator[None]:
        if owner not in self._owners:
            self._owners.append(owner)
        outer, self._record.seen, self._record._callers = self._record.seen, set(), set()
        self._nested.append(0.0)
        start = time.perf_counter()
        with ranks_by(partial(_recorded_rank, self._of(owner)), preload="tests.mutants.instrumented"):
            yield
        seconds = time.perf_counter() - start
        own = seconds - self._nested.pop()
        self._nested[-1] += seconds
        self._record.write(self._of(owner))
        self._record.seen, self._record._callers = outer, set()
        if owner in self.result["tests"]:
            self.result["tests"][owner]["seconds"] = own
        else:
            self.result["fixtures"][owner] = own

    def pytest_collection_finish(self, session):
        factors.instrument(self._record.factor)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        shared = [
            _fixture(definitions[-1])
            for name, definitions in item._fixtureinfo.name2fixturedefs.items()
            if definitions[-1].scope != "function"
        ]
        self.result["tests"][item.nodeid] = {"fixtures": shared}
        with self._owned(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.scope == "function":
            return (yield)
        with self._owned(_fixture(fixturedef)):
            return (yield)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.result["failed"].append(report.nodeid)
        if report.skipped:
            self.result["tests"].pop(report.nodeid, None)


def _fixture(definition) -> str:
    return f"{definition.baseid}::fixture {definition.argname}"


def _recorded_rank(folder: Path, *arguments) -> None:
    from tests.mutants.instrumented import RECORD

    with heard(RECORD.collective):
        harness._rank_main(*arguments)
    RECORD.write(folder)

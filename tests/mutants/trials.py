"""Runs each mutant against the tests that run its site, until one of them fails."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from _pytest.runner import runtestprotocol

from tests.mutants.mutant import Mutant

_QUICK = 0.1  # seconds


@dataclass(frozen=True)
class Trial:
    """What became of a mutant."""

    mutant: Mutant
    tried: int
    noticed_by: str | None = None  # a test; None: it survived all that were tried
    noticed_as: Literal["value", "error", "hang"] | None = None
    message: str = ""


class Tests:
    """What the recording says of the tests: which run a site, and in which order they are tried."""

    def __init__(self, recorded: dict) -> None:
        self._tests = recorded["tests"]
        self._seconds = {owner: test["seconds"] for owner, test in self._tests.items()} | recorded["fixtures"]
        self._sites = {owner: {site for _, site, _ in rows} for owner, rows in recorded["sites"].items()}

    def shared_fixtures_run(self, test: str, site: str) -> bool:
        """Whether the site runs in a fixture that `test` shares with others."""
        return any(site in self._sites.get(fixture, ()) for fixture in self._tests[test]["fixtures"])

    def _cost(self, test: str, site: str) -> float:
        """Seconds of a trial: fixtures that run the site are made anew."""
        fixtures = [f for f in self._tests[test]["fixtures"] if site in self._sites.get(f, ())]
        return sum(self._seconds[owner] for owner in (test, *fixtures))

    def of(self, site: str, first: Collection[str], of_a_file: int) -> tuple[list[str], list[str]]:
        """The tests that run `site`, those of the files `first` before others, quick ones before slow ones:
        no more than `of_a_file`, quick ones apart, and those that are left then."""
        run = [t for t in self._tests if site in self._sites[t] or self.shared_fixtures_run(t, site)]
        run.sort(key=lambda test: (_file_of(test) not in first, self._cost(test, site)))
        counts: Counter[str] = Counter()
        found: list[str] = []
        left: list[str] = []
        for test in run:
            counts[_file_of(test)] += self._cost(test, site) > _QUICK
            (found if counts[_file_of(test)] <= of_a_file else left).append(test)
        return found, left


def _file_of(test: str) -> str:
    return test.split("::")[0]


class Trials:
    """The pytest plugin that takes the place of pytest's own loop; `report` is told of every trial."""

    def __init__(
        self, mutants: Sequence[tuple[Mutant, list[str]]], tests: Tests, report: Callable[[Trial], None]
    ) -> None:
        self._mutants, self._tests, self._report = mutants, tests, report

    def pytest_runtestloop(self, session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for mutant, tests in self._mutants:
            self._report(self._try(session, items, mutant, tests))
        session._setupstate.teardown_exact(None)
        return True

    def _try(self, session, items: dict, mutant: Mutant, tests: list[str]) -> Trial:
        for number, test in enumerate(tests, 1):
            item, fresh = items[test], self._tests.shared_fixtures_run(test, mutant.site)
            # Fixtures that do not run the site may stay for the next test of this file.
            sibling = next((i for i in session.items if i is not item and i.parent is item.parent), None)
            session._setupstate.teardown_exact(None if fresh else item)
            with mutant.in_force():
                reports = runtestprotocol(item, log=False, nextitem=None if fresh else sibling)
            for report in reports:
                if report.failed:
                    message = report.longrepr.reprcrash.message
                    return Trial(mutant, number, test, _kind(message), message.strip())
        return Trial(mutant, len(tests))


def _kind(message: str) -> str:
    if "gave no result within" in message:
        return "hang"
    return "value" if message.startswith("assert ") or "AssertionError" in message else "error"

"""One change to the training code, in force in this process and in the ranks that it launches."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest.mock import patch

from tests.mutants import factors
from tests.mutants.collectives import heard
from tests.parallel import harness

PRELOAD = tuple(harness.PRELOAD)


@dataclass(frozen=True)
class Mutant:
    """A collective's call site, or a scale factor, that is dropped or doubled."""

    kind: Literal["collective", "factor"]
    site: str
    how: Literal["dropped", "doubled"] = "dropped"
    part: bool = False  # `site` is a part of a collective's name; all that have it are meant

    def __str__(self) -> str:
        return f"{self.how}: {self.site}"

    @contextlib.contextmanager
    def in_process(self) -> Iterator[None]:
        """Change this process alone."""
        if self.kind == "collective":
            with heard(self._told):
                yield
            return
        undo = factors.mutate(self.site, self.how)
        try:
            yield
        finally:
            undo()

    def _told(self, site: str) -> str | None:
        return self.how if site == self.site or (self.part and self.site in site) else None

    @contextlib.contextmanager
    def in_force(self, timeout: float = 30) -> Iterator[None]:
        """Change this process and all ranks that `harness.launch` starts meanwhile; these have `timeout`
        seconds."""
        with ranks_by(partial(_mutated_rank, self), timeout), self.in_process():
            yield


@contextlib.contextmanager
def ranks_by(main: Callable, timeout: float = 180, preload: str = __name__) -> Iterator[None]:
    """Ranks are started through `main`, which ends in `harness._rank_main` with the same arguments; their
    server imports `preload`."""
    with (
        patch.object(harness, "PRELOAD", [*PRELOAD, preload]),
        patch.object(harness, "_rank_main", main),
        patch.dict(harness.launch.__kwdefaults__, timeout=timeout),
    ):
        yield


def _mutated_rank(mutant: Mutant, *arguments) -> None:
    with mutant.in_process():
        harness._rank_main(*arguments)

"""What became of a start of a job, in lines of a file: for the script that decides whether to start it again.

    started 100 runs/eagle    the run (or stage) of this folder goes on from this iteration
    saved 150                 a checkpoint of it is complete
    stopped 163               it was told to stop and has saved: start it again
    failed                    a mistake that all ranks found: it would be found again

torchrun's own status says none of it: it is 1 for whatever ends a process, and for a signal.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

from megatron_eagle.training.monitoring.observer import Observer, Step

Word = Literal["started", "saved", "stopped", "failed"]


def note_outcome(file: Path, word: Word, *details: int | str) -> bool:
    """Add a line; whether it is there. A full disk keeps it out, and ends nothing."""
    with suppress(OSError), open(file, "a") as lines:
        lines.write(" ".join(map(str, (word, *details))) + "\n")
        lines.flush()
        return True
    return False


class RunOutcome(Observer):
    """Notes where a run starts and what it saves; how it ends is noted by who started it.

    With `active=False`, on all ranks but the first, it does nothing.
    """

    def __init__(
        self, file: Path, run: str, iteration: int, latest: Callable[[], int | None], *, active: bool
    ) -> None:
        """
        Args:
            run: the folder of its checkpoints.
            iteration: at which it starts.
            latest: iteration of the latest checkpoint that this rank knows of.
        """
        self._file, self._run, self._active = file, run, active
        self._latest, self._noted = latest, iteration

    def __enter__(self) -> Self:
        if self._active:
            note_outcome(self._file, "started", self._noted, self._run)
        return self

    def step_ended(self, step: Step, tell: Observer) -> None:
        self._note()

    def __exit__(self, *exception: object) -> None:
        self._note()

    def _note(self) -> None:
        saved = self._latest()
        if self._active and saved is not None and saved > self._noted:
            self._noted = saved
            note_outcome(self._file, "saved", saved)

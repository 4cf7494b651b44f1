"""A process' part in a preflight: it comes, looks, writes, exchanges, and waits for what rank 0 says."""

import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.preflight.exchange import exchange
from megatron_eagle.preflight.folders import remove_own, see_others, write_own
from megatron_eagle.preflight.meeting import Meeting, Process, node_name
from megatron_eagle.preflight.node import look_at_node
from megatron_eagle.runtime.slurm_step import step_processes

PINGS = 3  # questions for a node's time, of which the quickest counts


def own_process(environment: Mapping[str, str]) -> tuple[Process, dict[str, str]]:
    """This process among those of the job, with the environment by which they meet.

    Raises:
        UserError: as `step_processes`.
    """
    of_step = step_processes(environment)
    joined = {**environment, **of_step}
    device = int(joined.get("LOCAL_RANK", 0))
    local = int(environment["SLURM_LOCALID"]) if of_step else device
    ranks = int(joined.get("RANK", 0)), int(joined.get("WORLD_SIZE", 1))
    return Process(node_name(environment), *ranks, local=local, device=device), joined


class Participant:
    """Of this process, in a thread: whoever stands still there keeps nobody from hearing what rank 0 says."""

    def __init__(self, meeting: Meeting, seconds: float) -> None:
        """`seconds`: how long rank 0 may be silent."""
        self._meeting, self._seconds, self._process = meeting, seconds, meeting.process
        self._written: list[str] = []
        self._token = ""
        self._thread = threading.Thread(target=self._run, name="preflight", daemon=True)
        self._thread.start()

    def ended(self, seconds: float = 2.0) -> bool:
        """Whether it has, now or soon."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._take_part()
        except UserError:
            pass  # rank 0 is gone, which the main thread says
        finally:
            remove_own(self._written, self._token, self._process.node)

    def _take_part(self) -> None:
        meeting, process = self._meeting, self._process
        meeting.tell("here", process.node)
        self._begin("waiting for what to look at")
        places = self._listen("places")
        if places is None:
            return
        self._begin("a look at files, packages and GPUs")
        meeting.tell("report", look_at_node(process, **places).to_record())
        if process.is_first:
            self._answer_pings()
            self._try_folders()
        told = self._listen("exchange")
        remove_own(self._written, self._token, process.node)
        if told is None:
            return
        backend, rounds, seconds = told
        device = torch.device("cuda", process.device) if backend == "nccl" else torch.device("cpu")
        found = exchange(
            meeting.store_of("exchange"),
            process.rank,
            process.processes,
            device,
            rounds,
            seconds,
            self._begin,
        )
        meeting.tell("exchange", asdict(found))

    def _answer_pings(self) -> None:
        for number in range(PINGS):
            self._listen(f"ping/{self._process.rank}/{number}")
            self._meeting.tell(f"pong/{number}", time.time())

    def _try_folders(self) -> None:
        self._begin("a file in each folder that the run writes")
        node = self._process.node
        self._token, folders = self._listen("folders")
        errors = []
        for folder in folders:
            self._written.append(folder)
            try:
                write_own(folder, self._token, node)
            except UserError as error:
                errors.append(str(error))
        self._meeting.tell("wrote", errors)
        self._begin("a look for the files of the other nodes")
        wrote = self._listen("look")
        saw = {folder: sorted(see_others(folder, self._token, nodes)) for folder, nodes in wrote.items()}
        self._meeting.tell("saw", saw)

    def _begin(self, what: str) -> None:
        self._meeting.tell("at", what)

    def _listen(self, what: str) -> Any:
        return self._meeting.listen(what, self._seconds)


def wait_for_verdict(meeting: Meeting, seconds: float) -> int:
    """Wait for the exit status that rank 0 gives all.

    Args:
        seconds: how long rank 0 may be silent.
    Raises:
        UserError: it gives none.
    """
    status: int = meeting.listen("verdict", seconds)
    meeting.tell("left", None)
    return status


def patience(seconds: float, meet_seconds: float) -> float:
    """How long rank 0 may be silent where each part may take so long, and the first, until all have come,
    `meet_seconds`: it waits for all of them."""
    return 5 * seconds + meet_seconds


def leave(status: int, part: Participant) -> int:
    """Return the status; where this process' part stands still, end at once with it."""
    if part.ended():
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

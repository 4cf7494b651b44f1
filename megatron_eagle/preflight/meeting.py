"""How the processes of a preflight hear of each other: a store on rank 0's host, and an end to every wait."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.rendezvous import check_rendezvous, explained_rendezvous

T = TypeVar("T")
# The status of a process that hears no verdict from rank 0.
UNMET = 4


@dataclass(frozen=True)
class Process:
    """A process among those of the job.

    Attributes:
        node: the name of its node, as Slurm knows it.
        local: its number on the node.
        device: that of its GPU among those that it sees.
    """

    node: str
    rank: int = 0
    processes: int = 1
    local: int = 0
    device: int = 0

    @property
    def is_first(self) -> bool:
        """Whether it looks at its node for the others there."""
        return self.local == 0


def ended_within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises. A thread that does not end, as on a file system that hangs, is left.

    Raises:
        TimeoutError: it is not done in time.
    """
    result: list[T] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:  # for the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not result:
        raise TimeoutError(f"not done within {seconds:g} s")
    return result[0]


class Meeting:
    """Of all processes; rank 0 hears the others and tells them what is next.

    Raises:
        UserError: this process does not reach rank 0.
    """

    def __init__(
        self, process: Process, environment: Mapping[str, str], seconds: float, *, serve: bool = True
    ) -> None:
        """
        Args:
            environment: as torchrun gives it to a process.
            seconds: how long to wait for rank 0's host.
            serve: rank 0 keeps the store, where torchrun does not.
        """
        self.process = process
        self._environment, self._seconds = environment, seconds
        if process.processes == 1:
            self._server: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]  # not in its __all__
        else:
            check_rendezvous(environment)
            shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            with explained_rendezvous(seconds / 60):
                self._server = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # not in its __all__
                    environment["MASTER_ADDR"],
                    int(environment["MASTER_PORT"]),
                    is_master=serve and process.rank == 0 and not shared,
                    timeout=timedelta(seconds=seconds),
                    wait_for_workers=False,
                )
        self._store = self.store_of("meeting")

    def again(self) -> "Meeting":
        """Another connection: whoever waits in one keeps it from all other threads."""
        if self.process.processes == 1:
            return self
        return Meeting(self.process, self._environment, self._seconds, serve=False)

    def store_of(self, part: str) -> Any:
        """The store, with names of its own for each part and each start by torchrun."""
        prefix = f"preflight/{self._environment.get('TORCHELASTIC_RESTART_COUNT', 0)}/{part}"
        return torch.distributed.PrefixStore(prefix, self._server)  # type: ignore[attr-defined]  # not in its __all__

    def tell(self, what: str, value: Any) -> None:
        """For rank 0."""
        self._store.set(f"{what}/{self.process.rank}", json.dumps(value))

    def hear(self, what: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """What these ranks have told, by rank; of those that do so in time."""
        silent, told = sorted(ranks), dict[int, Any]()
        end, pause = time.monotonic() + seconds, 0.001
        while silent:
            for rank in [rank for rank in silent if self._store.check([f"{what}/{rank}"])]:
                told[rank] = json.loads(self._store.get(f"{what}/{rank}"))
                silent.remove(rank)
            if not silent or time.monotonic() > end:
                break
            time.sleep(pause)  # a wait that ends without an answer is a warning of torch's
            pause = min(2 * pause, 0.05)
        return told

    def announce(self, what: str, value: Any) -> None:
        """On rank 0, for all."""
        self._store.set(what, json.dumps(value))

    def listen(self, what: str, seconds: float) -> Any:
        """What rank 0 announces.

        Raises:
            UserError: nothing comes.
        """
        try:
            self._store.wait([what], timedelta(seconds=seconds))
            return json.loads(self._store.get(what))
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError):
            host = self._environment.get("MASTER_ADDR")
            raise UserError(
                f"{self.process.node}: rank 0 at {host} says nothing any more: look at its output, and "
                "whether its host lives"
            ) from None


def node_name(environment: Mapping[str, str]) -> str:
    """Slurm's name of this node, by which it is excluded; elsewhere NODE_NAME, or the host's."""
    return environment.get("SLURMD_NODENAME") or environment.get("NODE_NAME") or os.uname().nodename

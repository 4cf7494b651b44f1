"""Messages between all processes: collectives whose results are known, and the rate of pairs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Of each collective, and of a pair's message, by backend. A GPU's network needs more for its full rate.
_BYTES = {"gloo": 2**22, "nccl": 2**26}
_REPEATS = 3  # of which the quickest counts
Rounds = list[list[tuple[int, int]]]  # the pairs of ranks of each


@dataclass
class Exchange:
    """What a process found.

    Attributes:
        error: in which part it ended early, and why.
        wrong: collectives with other results than they must have.
        wrong_from: ranks from which other bytes came than they sent.
        seconds: of each collective.
        rates: byte/s in each direction, with each rank that was met.
    """

    rank: int
    error: str | None = None
    wrong: list[str] = field(default_factory=list)
    wrong_from: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)


def exchange(
    store: Any,
    rank: int,
    processes: int,
    device: torch.device,
    rounds: Rounds,
    seconds: float,
    progress: Callable[[str], None],
) -> Exchange:
    """`exchange_messages` in a process group of its own. Collective over all processes.

    Args:
        store: for the group.
        seconds: for which one message may take.
    """
    found = Exchange(rank)
    try:
        progress("the process group")
        with _group(store, rank, processes, device, seconds):
            exchange_messages(found, device, rounds, progress)
    except (RuntimeError, dist.DistError) as error:  # a group that does not come about
        found.error = f"the process group: {str(error).strip().splitlines()[0]}"
    return found


def exchange_messages(
    found: Exchange, device: torch.device, rounds: Rounds, progress: Callable[[str], None]
) -> None:
    """Run the collectives, and then the rounds of pairs, and note what comes of it. Collective.

    Args:
        rounds: of `rounds.process_pairs`.
        progress: is told what begins.
    """
    part = ""

    def begin(name: str) -> None:
        nonlocal part
        part = name
        progress(name)

    try:
        begin("all-reduce")
        _all_reduce(found, device)
        begin("all-to-all")
        _all_to_all(found, device)
        for number, pairs in enumerate(rounds, 1):
            begin(f"round {number} of pairs")
            partner = next((a + b - found.rank for a, b in pairs if found.rank in (a, b)), None)
            _meet(found, partner, device)
        begin("the end of the messages")
        dist.barrier()
    except (RuntimeError, dist.DistError) as error:  # also a time that is over
        found.error = f"{part}: {str(error).strip().splitlines()[0]}"


@contextmanager
def _group(store: Any, rank: int, processes: int, device: torch.device, seconds: float) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=seconds)
    )
    try:
        yield
    finally:
        if device.type == "cpu":  # NCCL's would wait for what does not come; the process ends anyway
            dist.destroy_process_group()


def _all_reduce(found: Exchange, device: torch.device) -> None:
    processes = dist.get_world_size()
    pattern = torch.arange(_elements(device), device=device) % 1021
    mine = pattern * (found.rank + 1)
    with _timed(found, "all-reduce", device):
        dist.all_reduce(mine)
    if not torch.equal(mine, pattern * (processes * (processes + 1) // 2)):
        found.wrong.append("all-reduce")


def _all_to_all(found: Exchange, device: torch.device) -> None:
    processes = dist.get_world_size()
    each = -(-_elements(device) // processes)
    numbers = torch.arange(processes, device=device)
    # Every piece says from whom to whom it goes.
    mine = (found.rank * processes + numbers).repeat_interleave(each)
    theirs = torch.empty_like(mine)
    with _timed(found, "all-to-all", device):
        dist.all_to_all_single(theirs, mine)
    right = (theirs.view(processes, each) == (numbers * processes + found.rank)[:, None]).all(dim=1)
    if not bool(right.all()):
        found.wrong.append("all-to-all")
        found.wrong_from += numbers[~right].tolist()


def _meet(found: Exchange, partner: int | None, device: torch.device) -> None:
    """Both ways at once with `partner`, while the other pairs do so too."""
    mine = torch.full((_elements(device),), found.rank, device=device)
    theirs = torch.full_like(mine, -1)
    best = None
    for _ in range(_REPEATS):
        dist.barrier()
        if partner is None:
            continue
        _synchronize(device)
        began = time.perf_counter()
        both = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for message in dist.batch_isend_irecv(both):
            message.wait()
        _synchronize(device)
        taken = time.perf_counter() - began
        best = taken if best is None else min(best, taken)
    if partner is not None and best is not None:
        found.rates[partner] = mine.nbytes / best
        if not bool((theirs == partner).all()):
            found.wrong_from.append(partner)


def _elements(device: torch.device) -> int:
    return _BYTES["nccl" if device.type == "cuda" else "gloo"] // torch.int64.itemsize


@contextmanager
def _timed(found: Exchange, name: str, device: torch.device) -> Iterator[None]:
    dist.barrier()
    _synchronize(device)
    began = time.perf_counter()
    yield
    _synchronize(device)
    found.seconds[name] = time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

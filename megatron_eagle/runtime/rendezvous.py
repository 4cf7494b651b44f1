"""How processes of several nodes find each other: what is wrong with it, in a line, before they wait for it.

gloo, which carries decisions and background saves between nodes, listens at the address that the node's own
name stands for, and at the loopback address where that is it or there is none: the other nodes then wait
until their time is over. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name an interface instead.
"""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator, Mapping

import torch

from megatron_eagle.errors import UserError


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Look at names and interfaces of this node; nothing is sent.

    Args:
        environment: as torchrun gives it to a process.
    Raises:
        UserError: an interface that this node has not, or a name under which no other node finds it.
    """
    _check_interfaces(environment)
    processes, here = (int(environment.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    master = environment.get("MASTER_ADDR")
    if processes <= here or master is None or "GLOO_SOCKET_IFNAME" in environment:
        return
    name = socket.gethostname()
    if _beyond_this_machine(name) or not _beyond_this_machine(master):  # a job whose nodes are one machine
        return
    raise UserError(
        f"this node's name {name} stands for no address that others reach ({_address(name)}), so that gloo "
        f"would listen where no other node finds it: set GLOO_SOCKET_IFNAME to the interface that the nodes "
        f"share, one of {_interfaces()}, or mend /etc/hosts"
    )


@contextlib.contextmanager
def explained_rendezvous(minutes: float) -> Iterator[None]:
    """What torch says of processes that do not find each other becomes a line with the places to look at.

    Raises:
        UserError: in place of torch's errors of stores and of the network.
    """
    try:
        yield
    except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError) as error:
        rank, processes = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"rank {rank} of {processes} on {socket.gethostname()} did not meet the others at {where} within "
            f"{minutes:g} minutes: were all {processes} started, does {where.rpartition(':')[0]} name the "
            f"first node from here, is the port open, and do NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name "
            f"the interface that the nodes share? ({str(error).splitlines()[0]})"
        ) from None


def _check_interfaces(environment: Mapping[str, str]) -> None:
    known = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = environment.get(variable, "")
        if given.startswith("^"):  # NCCL's "all but"
            continue
        wanted = [name for name in given.removeprefix("=").split(",") if name]
        exact = variable.startswith("GLOO") or given.startswith("=")
        there = [any(n == w or (not exact and n.startswith(w)) for n in known) for w in wanted]
        if wanted and not (all(there) if variable.startswith("GLOO") else any(there)):
            raise UserError(
                f"{variable}={given} names no interface of this node ({socket.gethostname()}), which has "
                f"{_interfaces()}: name the one that the nodes share"
            )


def _interfaces() -> str:
    return ", ".join(name for _, name in socket.if_nameindex() if name != "lo")


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _beyond_this_machine(name: str) -> bool:
    address = _address(name)
    return address is not None and not ipaddress.ip_address(address).is_loopback

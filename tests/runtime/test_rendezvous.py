"""Processes of several nodes that would not find each other are told why, instead of waiting."""

import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.runtime import rendezvous
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.rendezvous import check_rendezvous
from tests.paths import REPO

TWO_NODES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node-0"}


@pytest.fixture
def node(monkeypatch):
    """`node(own=..., master=...)`: this node is called node-1; the addresses that the two names stand for."""

    def names(own: str | None, master: str) -> None:
        addresses = {"node-0": master, "node-1": own}

        def resolve(name: str) -> str:
            if addresses.get(name) is None:
                raise socket.gaierror(-2, "Name or service not known")
            return addresses[name]

        monkeypatch.setattr(socket, "gethostname", lambda: "node-1")
        monkeypatch.setattr(socket, "gethostbyname", resolve)
        monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])

    return names


@pytest.mark.parametrize("own", ["127.0.1.1", None], ids=["loopback", "unknown"])
def test_a_name_that_no_other_node_can_use(own, node):
    node(own, "10.0.0.1")
    with pytest.raises(UserError, match="node-1 stands for no address that others .*eth0, ib0") as said:
        check_rendezvous(TWO_NODES)
    assert "GLOO_SOCKET_IFNAME" in str(said.value) and "\n" not in str(said.value)
    check_rendezvous(TWO_NODES | {"GLOO_SOCKET_IFNAME": "ib0"})
    check_rendezvous(TWO_NODES | {"WORLD_SIZE": "8"})


def test_names_that_will_do(node):
    node("10.0.0.2", "10.0.0.1")
    check_rendezvous(TWO_NODES)
    node("127.0.0.1", "127.0.0.1")  # as in tests/slurm, whose nodes are one machine
    check_rendezvous(TWO_NODES)


@pytest.mark.parametrize(
    ("variable", "value", "there"),
    [
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),
        ("GLOO_SOCKET_IFNAME", "ib0,ib1", False),
        ("NCCL_SOCKET_IFNAME", "ib", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "eno,eth", True),
        ("NCCL_SOCKET_IFNAME", "eno", False),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
    ],
)
def test_interfaces_by_name(variable, value, there, node):
    node("10.0.0.2", "10.0.0.1")
    environment = TWO_NODES | {variable: value}
    if there:
        check_rendezvous(environment)
        return
    with pytest.raises(UserError, match=f"{variable}={value} names no interface of this node .*eth0, ib0"):
        check_rendezvous(environment)


def lonely(connection) -> None:
    """The second of two processes, whose first never comes."""
    try:
        with process_group(Device("cpu"), timeout_minutes=0.01):
            connection.send("met")
    except UserError as error:
        connection.send(str(error))


def test_processes_that_do_not_meet(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=lonely, args=(theirs,))
    process.start()
    assert ours.poll(60)
    said = ours.recv()
    process.join()
    assert said.startswith("rank 1 of 2 on ") and f"did not meet the others at 127.0.0.1:{port}" in said
    assert "GLOO_SOCKET_IFNAME" in said and "\n" not in said


def test_errors_of_other_kinds_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^invalid$"), rendezvous.explained_rendezvous(1):
        raise RuntimeError("invalid")
    assert issubclass(torch.distributed.DistStoreError, RuntimeError)


RESTARTED = """
import os, torch
from megatron_eagle.runtime.device import Device, process_group
again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if not again and os.environ["RANK"] == "1":
    os._exit(137)
with process_group(Device("cpu")):
    torch.distributed.all_reduce(torch.ones(1))
assert again
"""


@pytest.mark.slow
def test_processes_that_are_started_again_meet(tmp_path):
    """One is killed where the others wait for it; torchrun starts all again, and they do not look for it."""
    (tmp_path / "rank.py").write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    known = {"PYTHONPATH": str(REPO), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*torchrun, "--max-restarts=1", str(tmp_path / "rank.py")],
        env=os.environ | known,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr

"""A small stand-in for Ray on one machine: `ray start` (`ray.scripts.scripts`), and what preprocessing calls.
Tasks run here, one after the other, when their result is asked for.

Nodes are files in STANDIN_DIR/ray_nodes that name their cores; the head's also names the address.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

NODES = Path(os.environ["STANDIN_DIR"]) / "ray_nodes"
FLAGS = {"head", "block", "port", "num-cpus", "address", "node-name", "include-dashboard"}
exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))


def init(**_) -> None:
    """Connect to RAY_ADDRESS, with the token that its nodes were started with."""
    if {node["token"] for node in _nodes()} != {os.environ["RAY_AUTH_TOKEN"]}:
        raise ConnectionError("Authentication token is missing or incorrect")
    heads = [node for node in _nodes() if node["head"]]
    if [node["port"] for node in heads] != [os.environ["RAY_ADDRESS"].partition(":")[2]]:
        raise ConnectionError(f"no head at {os.environ['RAY_ADDRESS']}")


def cluster_resources() -> dict[str, float]:
    return {"CPU": sum(node["cpus"] for node in _nodes())}


def nodes() -> list[dict]:
    return [{"Alive": True, "NodeName": node["name"]} for node in _nodes()]


def shutdown() -> None:
    pass


def remote(**_):
    return lambda function: SimpleNamespace(remote=lambda *arguments: (function, arguments))


def get(reference):
    function, arguments = reference
    return function(*arguments)


def cancel(reference, force: bool) -> None:
    pass


def _nodes() -> list[dict]:
    return [json.loads(file.read_text()) for file in NODES.glob("*.json")]


def start(arguments: list[str]) -> None:
    """`ray start`: a node until it is told to end."""
    options = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name not in FLAGS:
            sys.exit(f"Error: No such option: --{name}")
        options[name] = value
    assert "block" in options, "a node that goes into the background ends with its step"
    if "address" in options:
        assert options["address"] == os.environ["RAY_ADDRESS"]
    NODES.mkdir(exist_ok=True)
    file = NODES / f"{os.getpid()}.json"
    node = {"head": "head" in options, "port": options.get("port"), "cpus": int(options["num-cpus"])}
    node["name"] = options["node-name"]
    node["token"] = os.environ["RAY_AUTH_TOKEN"]
    file.write_text(json.dumps(node))
    door = socket.create_server(("localhost", int(options["port"]))) if node["head"] else None
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    if door is not None:
        door.close()
    file.unlink()


def main() -> None:
    """The command `ray`."""
    if sys.argv[1] != "start":
        sys.exit(f"Error: No such command '{sys.argv[1]}'")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    start(sys.argv[2:])

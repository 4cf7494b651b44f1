"""Nodes of a scheduler, as processes of this machine: the files' commands, the scheduler's environment.

What the files say of a cluster is replaced by what is here: /data by a folder, the image's folder by this
repository, the first node's name by localhost, eight GPUs by one process.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.paths import REPO
from tests.schedulers.files import KUBERNETES, SKYPILOT, documents, job_of

IMAGE = "/workspace/megatron-eagle"
INDEX, MACHINE = "metadata.annotations['batch.kubernetes.io/job-completion-index']", "spec.nodeName"


class Pods:
    """Two nodes; `start` gives the process of one, as its scheduler would start it."""

    def __init__(self, data: Path, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: instead of the files' variables, or beside them."""
        self.data = data
        self._changed = dict(environment or {})
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self._port = str(free.getsockname()[1])

    def jobset(self, node: int) -> subprocess.Popen[str]:
        """A pod of the JobSet."""
        (document,) = documents(KUBERNETES / "jobset.yaml")
        (container,) = job_of(document)["template"]["spec"]["containers"]
        given = {entry["name"]: _value(entry, node) for entry in container["env"]}
        return self._start(node, [*container["command"], *container["args"]], given)

    def trainjob(self, node: int) -> subprocess.Popen[str]:
        """A pod of the TrainJob, with what Kubeflow's torch policy adds."""
        _, document = documents(KUBERNETES / "trainjob.yaml")
        trainer, name = document["spec"]["trainer"], document["metadata"]["name"]
        given = {entry["name"]: _value(entry, node) for entry in trainer["env"]} | {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": "29500",
        }
        return self._start(node, [*trainer["command"], *trainer["args"]], given)

    def skypilot(self, node: int) -> subprocess.Popen[str]:
        """A node of the managed job."""
        (document,) = documents(SKYPILOT / "train.yaml")
        given = document["envs"] | {
            "SKYPILOT_NUM_NODES": str(document["num_nodes"]),
            "SKYPILOT_NODE_RANK": str(node),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1\n",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "NODE_NAME": f"machine-{node}",  # here their hosts have one name
            "HOME": str(self._home(node)),
        }
        run = document["run"].replace("PET_MASTER_PORT=29500", f"PET_MASTER_PORT={self._port}")
        return self._start(node, ["bash", "-c", run], given)

    def hook(self, node: int) -> subprocess.Popen[str]:
        """SkyPilot's hook on one node, before the nodes go."""
        (document,) = documents(SKYPILOT / "train.yaml")
        (hook,) = document["config"]["hooks"]
        environment = {**os.environ, "HOME": str(self._home(node))}
        return subprocess.Popen(["bash", "-c", hook["run"]], env=environment, text=True)

    def _home(self, node: int) -> Path:
        home = self.data / f"home{node}"
        home.mkdir(exist_ok=True)
        return home

    def _start(self, node: int, command: list[str], given: Mapping[str, str]) -> subprocess.Popen[str]:
        if "PET_NNODES" in given:
            here = {"PET_MASTER_ADDR": "localhost", "PET_MASTER_PORT": self._port, "PET_NPROC_PER_NODE": "1"}
            assert here.keys() <= given.keys()
            given = {**given, **here}
        environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **{name: value.replace("/data", str(self.data)) for name, value in given.items()},
            **self._changed,
        }
        words = [word.replace("/data", str(self.data)).replace(IMAGE, str(REPO)) for word in command]
        with open(self.data / f"node{node}.out", "a") as output:
            return subprocess.Popen(
                words, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
            )

    def said(self, node: int) -> str:
        """All that a node has printed."""
        return (self.data / f"node{node}.out").read_text()

    @property
    def outcome(self) -> list[str]:
        """What has become of the run so far."""
        file = self.data / "eagle-logs" / "outcome"
        return file.read_text().splitlines() if file.exists() else []


def _value(entry: Mapping[str, Any], node: int) -> str:
    """Of a container's variable: as written, or of its pod."""
    if "value" in entry:
        return str(entry["value"])
    return {INDEX: str(node), MACHINE: f"machine-{node}"}[entry["valueFrom"]["fieldRef"]["fieldPath"]]

"""examples/node.sh by the files' own commands: stopped, saved, gone on with; mistakes are not tried again."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_eagle.checkpoint import read_train_state
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.training.monitoring.metrics import read_metrics
from tests.data.helpers import conversation, make_store, make_tokenizer
from tests.schedulers.files import KUBERNETES, SKYPILOT, documents, judged
from tests.schedulers.pods import Pods

LENGTH = 256
Start = Callable[[int], subprocess.Popen[str]]


@pytest.fixture
def pods(tmp_path: Path) -> Pods:
    return Pods(tmp_path)


def programs(folder: Path, **statuses: int) -> str:
    """A program in place of Python that notes what it is called for and ends as told: check=2, torchrun=1."""
    file = folder / "python"
    cases = "".join(f"*{name}\\ *) exit {status} ;;\n" for name, status in statuses.items())
    file.write_text(f'#!/bin/bash\necho "$*" >>"{folder}/calls"\ncase "$*" in\n{cases}esac\n')
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"PET_NPROC_PER_NODE": "auto"}, "PET_NPROC_PER_NODE=auto: expected a number"),
        ({"PET_NNODES": "1:2"}, "PET_NNODES=1:2: expected a number"),  # torchrun's range
        ({"PET_NODE_RANK": "2"}, "PET_NODE_RANK=2 contradicts PET_NNODES=2: nodes count from 0"),
        ({"RUN_LOGS": ""}, "RUN_LOGS is not set"),
        ({"PET_NODE_RANK": ""}, "PET_NODE_RANK is not set"),
        ({}, "run.yaml: is its file system mounted?"),
    ],
)
def test_a_node_without_a_place(tmp_path: Path, changed: dict[str, str], said: str) -> None:
    if changed:
        (tmp_path / "run.yaml").touch()
    pods = Pods(tmp_path, changed)
    assert pods.jobset(0).wait(30) == 2
    assert said in pods.said(0) and pods.said(0).count("\n") == 1


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ({"check": 2}, 2),
        ({"check": 1}, 75),
        ({"preflight": 2}, 2),  # wrong on all nodes alike
        ({"preflight": 3}, 75),
        ({"preflight": 4}, 75),  # it has lost the first node
        ({"torchrun": 1}, 75),
    ],
)
def test_what_a_failure_leads_to(tmp_path: Path, ends: dict[str, int], status: int) -> None:
    (tmp_path / "run.yaml").touch()
    pods = Pods(tmp_path, {"PYTHON": programs(tmp_path, **ends)})
    assert pods.jobset(0).wait(30) == status
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0][:4] == ["tools/train.py", "check", "--processes", "2"]
    expected = ["check", "preflight", "megatron_eagle.runtime.torchrun"]
    stops_at = {"check": 1, "preflight": 2, "torchrun": 3}[next(iter(ends))]
    assert [call[1] for call in calls] == expected[:stops_at]


def test_a_node_where_no_python_starts_is_named(tmp_path: Path) -> None:
    """Whatever the preflight ends with that is none of its own; by machine and host."""
    (tmp_path / "run.yaml").touch()
    pods = Pods(tmp_path, {"PYTHON": programs(tmp_path, preflight=127), "PET_NPROC_PER_NODE": "2"})
    assert pods.jobset(0).wait(30) == 75
    name = f"{os.uname().nodename}@machine-0"
    assert f"node.sh: {name}: the preflight has ended with status 3 and names {name}, to be" in pods.said(0)
    assert (tmp_path / "eagle-logs" / "bad-nodes").read_text() == f"{name}\n"
    assert pods.said(0).count(f"bad node: {name}: ") == 1


def test_every_command_has_its_place_and_the_network(tmp_path: Path) -> None:
    """The network's file is read before each; a preflight's process is told which of the job's it is."""
    (tmp_path / "run.yaml").touch()
    (tmp_path / "network.sh").write_text("export NCCL_SOCKET_IFNAME=eth7\n")
    program = Path(programs(tmp_path))
    noted = '"$NCCL_SOCKET_IFNAME ${RANK:-} ${WORLD_SIZE:-} ${LOCAL_RANK:-} ${MASTER_ADDR:-} $NODE_NAME"'
    program.write_text(f'#!/bin/bash\necho {noted} >>"{tmp_path}/calls"\n')
    settings = {"PYTHON": str(program), "NETWORK": str(tmp_path / "network.sh"), "PET_NPROC_PER_NODE": "2"}
    assert Pods(tmp_path, settings).jobset(0).wait(30) == 0
    check, *both, torchrun = (tmp_path / "calls").read_text().splitlines()
    name = f"{os.uname().nodename}@machine-0"
    assert check == torchrun == f"eth7     {name}"
    assert sorted(both) == [f"eth7 {rank} 4 {rank} localhost {name}" for rank in (0, 1)]
    assert Pods(tmp_path, settings | {"PREFLIGHT": "no"}).jobset(0).wait(30) == 0
    assert (tmp_path / "calls").read_text().count("\n") == 6
    assert Pods(tmp_path, settings | {"NETWORK": "/absent"}).jobset(0).wait(30) == 2
    assert "NETWORK=/absent: cannot read this file on " in Pods(tmp_path).said(0)


@pytest.mark.parametrize(("word", "status"), [("failed", 2), ("stopped 7", 75), ("saved 7", 0)])
def test_torchrun_ends_well_and_the_run_says_how(tmp_path: Path, word: str, status: int) -> None:
    """With `--outcome` processes that stop or find a mistake end with status 0."""
    (tmp_path / "run.yaml").touch()
    program = Path(programs(tmp_path))
    program.write_text(
        f'#!/bin/bash\n[[ $* != *torchrun* ]] || echo {word} >>"{tmp_path}/eagle-logs/outcome"\n'
    )
    assert Pods(tmp_path, {"PYTHON": str(program)}).jobset(0).wait(30) == status


def test_starts_that_save_nothing(tmp_path: Path) -> None:
    """Three in a row are the last; one that saves something new begins the count again."""
    (tmp_path / "run.yaml").touch()
    pods = Pods(tmp_path, {"PYTHON": programs(tmp_path, torchrun=1)})
    outcome = tmp_path / "eagle-logs" / "outcome"
    assert [pods.jobset(0).wait(30) for _ in range(2)] == [75, 75]
    with open(outcome, "a") as lines:
        lines.write("started 100 /run\nsaved 150\n")
    assert [pods.jobset(0).wait(30) for _ in range(2)] == [75, 75]
    with open(outcome, "a") as lines:
        # torchrun starts its processes again, of which one falls back to what is older.
        lines.write("started 150 /run\nstarted 150 /run\nstarted 100 /run\nsaved 150\nstopped 150\n")
    assert pods.jobset(0).wait(30) == 2
    assert "3 starts in a row have saved nothing new" in pods.said(0)
    assert pods.outcome.count("launched") == 5


def test_the_first_node_does_not_come(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    pods = Pods(tmp_path, {"MEET_SECONDS": "1"})
    assert pods.jobset(1).wait(30) == 1
    assert "did not answer in 1 s" in pods.said(1)


@pytest.mark.parametrize(("node", "at"), [(0, "check"), (0, "preflight"), (1, "")])
def test_told_to_stop_before_the_run(tmp_path: Path, node: int, at: str) -> None:
    """While the settings are looked at, or the nodes, or while the first node is waited for."""
    (tmp_path / "run.yaml").touch()
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/bash\n[[ $2 == {at} ]] || exit 0\necho $$ >"{tmp_path}/calls"\nexec sleep 60\n')
    slow.chmod(0o755)
    process = Pods(tmp_path, {"PYTHON": str(slow)}).jobset(node)
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls").exists() and not (node and (tmp_path / "eagle-logs").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    alone = Path("/proc", "absent" if node else (tmp_path / "calls").read_text().strip())
    while alone.exists():
        assert time.monotonic() < deadline, "it goes on alone"
        time.sleep(0.05)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of the smallest model into `tmp_path`/run, longer than a test."""
    records = [conversation("Hi", "Yes " * (k % 5 + 1)) for k in range(40)]
    store = make_store(tmp_path, make_tokenizer(tmp_path / "tokenizer"), records, (LENGTH,))
    write_packs(store, LENGTH, seed=0)
    sections = {
        "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
        "data": {"path": str(store), "length": LENGTH},
        "training": {"train_iterations": 2000, "global_batch_size": 2, "precision": "fp32"},
        "checkpoint": {"path": str(tmp_path / "run")},
        "logging": {"progress": False, "tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "run.yaml"


@pytest.fixture
def started(pods: Pods) -> Iterator[Callable[[str], list[subprocess.Popen[str]]]]:
    """Starts both nodes by a way's name; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(way: str) -> list[subprocess.Popen[str]]:
        begin: Start = getattr(pods, way)
        both = [begin(0), begin(1)]
        processes.extend(both)
        return both

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(120)


def wait_for_steps(pods: Pods, nodes: list[subprocess.Popen[str]]) -> None:
    file, deadline = pods.data / "run" / "logs" / "metrics.jsonl", time.monotonic() + 240
    while not file.exists() or len(list(read_metrics(file))) < 2:
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes), pods.said(0)
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "told"), [("jobset", "both"), ("trainjob", "second"), ("skypilot", "hook")])
def test_stopped_saved_and_gone_on_with(pods: Pods, config: Path, started, way: str, told: str) -> None:
    """Told on both nodes, on one (an eviction) or by SkyPilot's hook: all nodes save, end with 75 and go on.

    Where one was told, the scheduler tells the other when the first has ended.
    """
    nodes = started(way)
    wait_for_steps(pods, nodes)
    assert "preflight: 2 nodes, 2 processes, " in pods.said(0) and "nothing stands in the way" in pods.said(0)
    if told == "hook":
        hook = pods.hook(0)
        assert nodes[0].wait(120) == 75
        assert pods.outcome[-1].startswith("stopped") and hook.wait(10) == 0
    else:
        nodes[1].send_signal(signal.SIGTERM)
    if told == "second":
        assert nodes[1].wait(120) == 75
    nodes[told == "hook"].send_signal(signal.SIGTERM)
    assert [node.wait(60) for node in nodes] == [75, 75], pods.said(0) + pods.said(1)
    stopped = read_train_state(pods.data / "run").iteration
    assert pods.outcome[-1] == f"stopped {stopped}" and pods.outcome[0] == "launched"
    if way == "skypilot":
        (document,) = documents(SKYPILOT / "train.yaml")
        assert 75 in document["resources"]["job_recovery"]["recover_on_exit_codes"]
    else:
        document = documents(KUBERNETES / f"{way}.yaml")[0]
        assert judged(document, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert "Traceback" not in pods.said(0) + pods.said(1)

    sections = yaml.safe_load(config.read_text())
    sections["training"]["stop_at_iteration"] = stopped + 3
    config.write_text(yaml.safe_dump(sections))
    assert [node.wait(240) for node in started(way)] == [0, 0], pods.said(0) + pods.said(1)
    iterations = [line.iteration for line in read_metrics(pods.data / "run" / "logs" / "metrics.jsonl")]
    assert iterations == list(range(1, stopped + 4))


@pytest.mark.slow
def test_a_mistake_in_the_settings(pods: Pods, config: Path) -> None:
    """Is one line of one node, and final."""
    config.write_text(config.read_text().replace("global_batch_size", "global_batch_sise"))
    assert pods.jobset(0).wait(120) == 2
    assert "global_batch_sise" in pods.said(0) and "Traceback" not in pods.said(0)
    assert pods.outcome == ["launched"]
    assert judged(documents(KUBERNETES / "jobset.yaml")[0], 2) == "FailJobSet"

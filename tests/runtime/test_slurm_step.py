"""Processes that srun starts know their ranks by the step's variables; what contradicts itself is refused."""

import socket
import subprocess
import sys

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.slurm_step import first_host, host_names, step_nodes, step_processes

# As srun of Slurm 22.05 sets them; SLURM_NTASKS and others also stand in the batch script.
JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
STEP = JOB | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[2-3,7]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_process_of_a_step():
    assert step_processes(STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n2",
        "MASTER_PORT": str(20000 + 41 + 2 * 1009),
    }
    assert step_processes(STEP | {"SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "1"
    assert step_processes(STEP | {"SLURM_GPUS_PER_TASK": "1"})["LOCAL_RANK"] == "0"
    assert step_processes(STEP | {"CUDA_VISIBLE_DEVICES": "0"})["LOCAL_RANK"] == "0"
    assert step_processes(STEP | {"CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"
    port = step_processes(STEP | {"SLURM_STEP_ID": "3"})["MASTER_PORT"]
    assert port != step_processes(STEP)["MASTER_PORT"]
    given = {"MASTER_ADDR": "ib-n2", "MASTER_PORT": "9"}
    assert not given.keys() & step_processes(STEP | given).keys()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,  # the batch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"TORCHELASTIC_RUN_ID": "41", "RANK": "0", "WORLD_SIZE": "40"},
        STEP | {"RANK": "3", "WORLD_SIZE": "5"},  # by hand, as many do
        STEP | {"RANK": "9", "WORLD_SIZE": "40"},  # a launcher of one's own on each node
    ],
)
def test_no_step_of_processes(environment):
    assert step_processes(environment) == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "0"}, "srun has started 5 processes, and RANK is set but not WORLD_SIZE: unset it"),
        ({"WORLD_SIZE": "5"}, "WORLD_SIZE is set but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "5"}, "RANK=0 contradicts SLURM_PROCID=3"),
        ({"SLURM_LOCALID": "", "SLURM_STEP_NODELIST": ""}, "SLURM_LOCALID, SLURM_STEP_NODELIST are not set"),
        ({"SLURM_HET_SIZE": "2"}, "heterogeneous job"),
        ({"SLURM_DISTRIBUTION": "arbitrary"}, "MASTER_ADDR"),
    ],
)
def test_what_is_ambiguous_is_refused(changed, message):
    with pytest.raises(UserError, match=message) as refused:
        step_processes(STEP | changed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("n[007,009-12],m1", "n007"),
        ("a-b.c,d", "a-b.c"),
        ("rack[1-2]n[04-08,11]-ib,login1", "rack1n04-ib"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


RANK = """
import os, signal, sys, time
from pathlib import Path


def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    os._exit(75)


signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
print("rank", os.environ["RANK"], os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"], flush=True)
there = Path(sys.argv[2])
if os.environ["RANK"] == "1":
    there.touch()
if sys.argv[1] == "fail":
    while not there.exists():
        time.sleep(0.01)
    sys.exit(3)
if sys.argv[1] == "stop" and os.environ["RANK"] == "0":
    while not there.exists():
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(0.2)
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(30)
"""


@pytest.mark.parametrize(
    ("what", "status", "line"),
    [
        ("stop", 75, "torchrun on {host} ended after SIGUSR1\n"),
        ("fail", 1, "torchrun on {host} ended: rank {rank} was the first to end early, by status 3\n"),
    ],
)
def test_torchrun_ends_with_a_line(tmp_path, what, status, line):
    """And leaves the processes' logs apart, in a folder of the node's name."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "megatron_eagle.runtime.torchrun", "--standalone", "--nproc-per-node=2"]
    command += ["--signals-to-handle=SIGTERM,SIGUSR1", "--shutdown-timeout=20", "--tee=3"]
    command += ["--log-dir", f"{tmp_path}/%h", str(tmp_path / "rank.py"), what, str(tmp_path / "there")]
    run = subprocess.run(command, capture_output=True, text=True)
    host = socket.gethostname()
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    assert any(line.format(host=host, rank=rank) in run.stderr for rank in range(2))
    logs = sorted((tmp_path / host).glob("*/attempt_0/*/stdout.log"))
    saved = "saved\n" if what == "stop" else ""
    assert [log.read_text() for log in logs] == [f"rank 0 1\n{saved}", f"rank 1 1\n{saved}"]


@pytest.mark.slow
def test_torchrun_does_not_wait_for_ever():
    """For a node that does not come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "megatron_eagle.runtime.torchrun", "--nnodes=2", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=join_timeout=2", "absent.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert f"torchrun on {socket.gethostname()} ended: it did not meet the other nodes (" in run.stderr


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("n[2-3,7],login1", ["n2", "n3", "n7", "login1"]),
        ("rack[1-2]n[08-10]", [f"rack{rack}n{node}" for rack in (1, 2) for node in ("08", "09", "10")]),
        ("gpu-[099-101].site", ["gpu-099.site", "gpu-100.site", "gpu-101.site"]),
    ],
)
def test_names_of_hosts(nodes, names):
    assert host_names(nodes) == names


def test_the_nodes_of_a_step():
    assert step_nodes(STEP) == {"n2": 2, "n3": 2, "n7": 1} and step_nodes(JOB) == {}

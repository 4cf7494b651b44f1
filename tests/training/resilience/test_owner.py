"""A run folder has one owner: who lives is left alone, who is gone followed, of two starters one starts."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.resilience import owner as owner_module
from megatron_eagle.training.resilience.owner import OWNER, Owner, Ownership, describe_owner
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.parallel.harness import launch
from tests.paths import REPO
from tests.training.synthetic_data import SyntheticLoader
from tests.training.test_training_loop import train_rank, write_run

BEAT = 0.1
AT_ONCE = 20.0  # seconds, on a busy machine, where a heartbeat is an hour
JOB = {"SLURM_JOB_ID": "12", "SLURM_CLUSTER_NAME": "c", "SLURM_STEP_ID": "3"}


def elsewhere(folder: Path, environment: dict[str, str] | None = None, **fields) -> Owner:
    """An owner of `folder` on another machine, whose processes are not to be seen here."""
    theirs = Owner.here(environment or {}, BEAT)
    theirs = replace(theirs, **{"host": "n7", "pid": 4711, "machine": "another", **fields})
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(json.dumps(asdict(theirs)))
    return theirs


@contextmanager
def beating(folder: Path):
    """Its sign of life."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            os.utime(folder / OWNER)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    stop.set()
    thread.join()


def owner_of(folder: Path) -> Owner:
    return Owner(**json.loads((folder / OWNER).read_text()))


def take(folder: Path) -> float:
    """Seconds until it was taken."""
    began = time.monotonic()
    with Ownership(folder, beat=BEAT):
        assert owner_of(folder).pid == os.getpid()
        return time.monotonic() - began


def in_a_process(folder: Path, then: str, beat: float = BEAT) -> subprocess.Popen:
    """Owns `folder`, says so, and does `then`."""
    code = (
        "import sys, time\n"
        "from megatron_eagle.errors import UserError, run_cli\n"
        "from megatron_eagle.training.resilience.owner import Ownership\n"
        "def main():\n"
        f"    with Ownership({str(folder)!r}, beat={beat}) as mine:\n"
        f"        print('owned', flush=True); {then}\n"
        "run_cli(main)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_folder_is_owned_while_a_run_lasts(tmp_path):
    (tmp_path / "run").mkdir()
    with Ownership(tmp_path / "run", beat=BEAT):
        first = (tmp_path / "run" / OWNER).stat().st_mtime_ns
        time.sleep(3 * BEAT)
        assert (tmp_path / "run" / OWNER).stat().st_mtime_ns > first
        with Ownership(tmp_path / "run", active=False):  # any other rank
            pass
    assert not list((tmp_path / "run").iterdir())
    with Ownership(tmp_path / "a" / "b", beat=BEAT):
        pass
    assert not (tmp_path / "a").exists(), "nothing came of it"
    with Ownership(tmp_path / "a" / "b", beat=BEAT):
        (tmp_path / "a" / "c").touch()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["c"]


def test_one_who_lives_is_named(tmp_path):
    """Elsewhere known by the file that moves; here by its process, at once."""
    elsewhere(tmp_path, JOB)
    with beating(tmp_path), pytest.raises(UserError) as refused:
        take(tmp_path)
    pattern = (
        r"another run writes here \(job 12, process 4711 on n7, since \d{4}-.* UTC\): wait for it, stop it"
    )
    assert re.search(pattern, str(refused.value)) and "\n" not in str(refused.value)
    before = (tmp_path / OWNER).read_text()

    here = Owner.here({}, 3600)
    elsewhere(tmp_path, host=here.host, pid=here.pid, machine=here.machine, beat=3600)
    with pytest.raises(UserError, match=f"process {os.getpid()} on {here.host}"):
        take(tmp_path)
    assert before != (tmp_path / OWNER).read_text() and owner_of(tmp_path).token != here.token


def test_three_missed_heartbeats(tmp_path, capsys):
    theirs = elsewhere(tmp_path, JOB)
    assert take(tmp_path) > 3 * BEAT
    said = capsys.readouterr().err
    assert said == f"{tmp_path}: taken over from {theirs}: it gives no sign of life\n"

    elsewhere(tmp_path)  # long ago by the file system's time: still looked at, for one heartbeat
    os.utime(tmp_path / OWNER, (0, 0))
    assert take(tmp_path) > BEAT


def test_clocks_that_differ(tmp_path):
    """Where the node that writes sets the time, an hour late, it is still alive."""
    elsewhere(tmp_path)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            os.utime(tmp_path / OWNER, (time.time() - 3600,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        time.sleep(2 * BEAT)
        with pytest.raises(UserError, match="another run writes here"):
            take(tmp_path)
    finally:
        stop.set()
        thread.join()


def test_a_process_that_was_killed_here(tmp_path, capsys):
    """Its number may be another process' today."""
    killed = in_a_process(tmp_path, "time.sleep(60)", beat=3600)
    assert killed.stdout.readline() == "owned\n"
    killed.kill()
    psutil.wait_procs([psutil.Process(killed.pid)], timeout=0.5)  # not asked for its status yet: a zombie
    assert take(tmp_path) < AT_ONCE and "its process is gone" in capsys.readouterr().err
    killed.communicate()
    here = Owner.here({}, 3600)
    elsewhere(tmp_path, machine=here.machine, pid=here.pid, process="1", beat=3600)
    assert take(tmp_path) < AT_ONCE


RESTARTED = {"TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.mark.parametrize(
    ("before", "now", "at_once"),
    [
        (JOB, JOB | {"SLURM_RESTART_COUNT": "1"}, True),
        (JOB | {"SLURM_RESTART_COUNT": "1"}, JOB | {"SLURM_RESTART_COUNT": "2", "SLURM_STEP_ID": "1"}, True),
        (JOB, JOB | RESTARTED, True),
        (JOB | {"SLURM_RESTART_COUNT": "1"} | RESTARTED, JOB | {"SLURM_RESTART_COUNT": "2"}, True),
        (JOB | {"SLURM_RESTART_COUNT": "1"}, JOB | RESTARTED, False),
        (JOB, JOB, False),
        (JOB, JOB | {"SLURM_JOB_ID": "13"} | RESTARTED, False),
        (JOB, JOB | {"SLURM_CLUSTER_NAME": "d", "SLURM_RESTART_COUNT": "1"}, False),
        (JOB, JOB | {"SLURM_STEP_ID": "4"} | RESTARTED, False),  # a second torchrun in the job
        ({}, RESTARTED, False),
        ({}, {}, False),
    ],
    ids=str,
)
def test_a_job_follows_itself(tmp_path, monkeypatch, before, now, at_once):
    """Though the file moved a moment ago. The control is everything that is another's."""
    for name in (*JOB, "SLURM_RESTART_COUNT", *RESTARTED):
        monkeypatch.delenv(name, raising=False)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    if at_once:
        elsewhere(tmp_path, before, beat=3600)
        assert take(tmp_path) < AT_ONCE
    else:
        elsewhere(tmp_path, before)
        with beating(tmp_path), pytest.raises(UserError, match="another run writes here"):
            take(tmp_path)


@pytest.mark.parametrize(
    "left",
    [
        pytest.param("nothing", marks=pytest.mark.slow),
        "a silent owner",
        pytest.param("a lock", marks=pytest.mark.slow),
    ],
)
def test_of_many_starters_one_starts(tmp_path, monkeypatch, left):
    """All at once, by processes; each other one is told who."""
    if left != "nothing":
        elsewhere(tmp_path, machine="another" if left == "a silent owner" else Owner.here({}, 1).machine)
    gate = tmp_path / "gate"
    wait = f"while not Path({str(gate)!r}).exists(): time.sleep(0.001)\n"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from megatron_eagle.errors import run_cli\n"
        "from megatron_eagle.training.resilience import owner\n"
        "owner._LOCK_SECONDS = 0.3\n"
        f"print('there', flush=True)\n{wait}"
        "def main():\n"
        f"    with owner.Ownership({str(tmp_path)!r}, beat={BEAT}):\n"
        "        time.sleep(1)\n"
        "run_cli(main)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(6)
    ]
    assert all(starter.stdout.readline() == "there\n" for starter in starters)
    if left == "a lock":
        (tmp_path / owner_module._LOCK).touch()
    gate.touch()
    said = {starter: starter.communicate(timeout=60)[1] for starter in starters}
    winners = [starter for starter in starters if starter.returncode == 0]
    assert len(winners) == 1
    for starter, error in said.items():
        if starter is not winners[0]:
            assert starter.returncode == 2 and error.count("\n") == 1
            assert f"another run writes here (process {winners[0].pid} on " in error
    assert {file.name for file in tmp_path.iterdir()} == {"gate"}


def test_who_lost_the_folder_ends(tmp_path):
    """A process that was stopped, and wakes up: by its next sign of life, or before it saves."""
    for then, beat in (("time.sleep(60)", BEAT), ("time.sleep(1); mine.check()", 3600)):
        owned = in_a_process(tmp_path, then, beat)
        assert owned.stdout.readline() == "owned\n"
        theirs = elsewhere(tmp_path)
        _, error = owned.communicate(timeout=20)
        assert owned.returncode == 2 and error.count("\n") == 1
        assert "has lost its folder to another (process 4711 on n7" in error
        assert owner_of(tmp_path) == theirs, "the other's file is left alone"
        (tmp_path / OWNER).unlink()


def test_an_owner_is_described(tmp_path):
    """By the file where its machine is another, by its process here; nothing is written."""
    assert describe_owner(tmp_path) is None
    elsewhere(tmp_path, JOB, beat=60)
    said = describe_owner(tmp_path)
    assert re.fullmatch(r"job 12, process 4711 on n7, since .* UTC; alive: last sign of life \d s ago", said)
    os.utime(tmp_path / OWNER, (time.time() - 200,) * 2)
    assert re.search(r"; stale: no sign of life for 20\d s$", describe_owner(tmp_path))
    here = Owner.here({}, 60)
    elsewhere(tmp_path, host=here.host, pid=here.pid, machine=here.machine, process=here.process, beat=60)
    os.utime(tmp_path / OWNER, (time.time() - 200,) * 2)
    assert re.search(r"; alive: last sign of life 20\d s ago$", describe_owner(tmp_path))
    elsewhere(tmp_path, host=here.host, pid=here.pid, machine=here.machine, process="0", beat=60)
    assert describe_owner(tmp_path).endswith("; stale: its process is gone")
    assert [file.name for file in tmp_path.iterdir()] == [OWNER]


def test_a_file_that_is_no_owner(tmp_path):
    (tmp_path / OWNER).write_text('{"token": 3')
    take(tmp_path)
    (tmp_path / OWNER).mkdir()
    with pytest.raises(UserError, match="cannot write here whose run it is: Is a directory"):
        take(tmp_path)


def refused_rank(config: str, world_size: int) -> str:
    try:
        train_rank(config, world_size, [])
    except AgreedError as error:
        return str(error)
    return ""


def test_all_ranks_are_refused_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    write_run(tmp_path)
    file = tmp_path / "run.yaml"
    here = Owner.here({}, 3600)
    elsewhere(run, machine=here.machine, pid=here.pid, process=here.process)
    errors = launch(refused_rank, 2, str(file), 2)
    assert errors[0] == errors[1] and f"another run writes here (process {os.getpid()} on n7" in errors[0]
    assert [entry.name for entry in run.iterdir()] == [OWNER]
    (run / OWNER).unlink()
    config = load_run_config(file, ["training.stop_at_iteration=1"], world_size=1)
    train(config, open_loader=SyntheticLoader)
    assert (run / "logs").exists() and not (run / OWNER).exists()


def test_a_rank_ends_with_its_launcher(tmp_path):
    """Killed, torchrun leaves its ranks to themselves; the control has no torchrun."""
    code = (
        "import os, sys, time\n"
        "from megatron_eagle.runtime import launcher\n"
        "launcher._SECONDS = 0.1\n"
        "with launcher.end_with_launcher():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "rank.py").write_text(code)
    shell = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'rank.py')!r}])"
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}", "RANK": "3"}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    for run_id, ends in (({"TORCHELASTIC_RUN_ID": "none"}, True), ({}, False)):
        with subprocess.Popen(
            [sys.executable, "-c", shell],
            env=environment | run_id,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "said").open("w"),
            text=True,
        ) as parent:
            rank = psutil.Process(int(parent.stdout.readline()))
            parent.kill()
            gone, alive = psutil.wait_procs([rank], timeout=10 if ends else 0.6)
            assert len(gone) == ends
            for process in alive:
                process.kill()
        said = (tmp_path / "said").read_text()
        assert said == (f"error: rank 3: torchrun (process {parent.pid}) is gone\n" if ends else "")

"""A real Slurm on one machine, for tests: each node in network, host name and mount namespaces of its own.

python -m tests.cluster.slurm             why it cannot start here, and what to install; status 1 then
python -m tests.cluster.slurm NODES       starts it and a shell that can use it; ends it with the shell

Nothing outlives it, also where it is told to end (SIGTERM, SIGHUP), and nothing of the machine is changed:
the nodes' names stand in a file that is mounted over /etc/hosts in their namespaces alone. What a killed test
run leaves (bridge, namespaces, their processes) the next start takes away. No cgroups, no systemd, no
database; CPUs are declared, not real.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self

import psutil

from megatron_eagle.errors import run_cli

INSTALL = "apt-get install -y slurm-wlm munge iproute2"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "tc", "nsenter", "unshare")
OLDEST = (22, 5)
BRIDGE, NET, CONTROLLER = "eagle-slurm", "10.77.0", "eagle-ctl"
DISK_MB = 64  # of the small disk that a test may fill
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={controller}({net}.10)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
MailProg={folder}/mail
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldPort=17817
SlurmdPort=17818
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{names}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can start on this machine, and what to do; None: it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    reasons = ["needs root, for namespaces: run it in a container as root"] if os.geteuid() != 0 else []
    reasons += [f"{', '.join(absent)} not found: {INSTALL}"] if absent else []
    if reasons:
        return "; ".join(reasons)
    said = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    if found is None or tuple(map(int, found.groups())) < OLDEST:
        return (
            f"{said.strip() or 'slurmctld -V says nothing'}: needs Slurm {OLDEST[0]}.{OLDEST[1]:02} or later,"
            f" as Debian 12 and Ubuntu 24.04 have it: {INSTALL}"
        )
    made = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    if made.returncode:
        return f"root may not make namespaces here ({made.stderr.strip()}): give it SYS_ADMIN and NET_ADMIN"
    return None


class Slurm:
    """Starts with `with`. Nodes are called n1, n2, ...; every node sees the whole file system.

    Attributes:
        environment: in which Slurm's commands find this cluster.
        disk: a file system of DISK_MB of its own.
    """

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder, self.disk = folder.absolute(), folder.absolute() / "disk"
        self.names = [f"n{i}" for i in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            RuntimeError: another one runs, or it does not come up.
        """
        with ExitStack() as opened:
            opened.enter_context(interrupted_by_signals())
            lock = opened.enter_context(open(Path(tempfile.gettempdir(), "megatron-eagle-slurm.lock"), "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    "another Slurm of these tests runs on this machine: one at a time"
                ) from None
            _take_away()
            opened.callback(_take_away)
            self._prepare()
            opened.callback(_run, "umount", "--lazy", str(self.disk))
            opened.callback(self._end_daemons)
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
            places = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
            log = f"--log-file={self.folder}/munge.log"
            self._start("munged", "munged", "--foreground", "--force", *places, log)
            self._start("slurmctld", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")
            for name in self.names:
                self.start_node(name)
            self.wait_for_nodes()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._start(name, "slurmd", "-D", "-N", name, "-f", f"{self.folder}/slurm.conf")

    def kill_node(self, name: str) -> None:
        """All processes of a node at once, its daemon and its jobs, as when it loses power."""
        _kill_inside(name)
        self._daemons.pop(name).wait()

    def kill_daemon(self, name: str) -> None:
        """The daemon of a node alone; its jobs go on."""
        self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of a node, with its daemon and its jobs."""
        pids = {int(pid) for pid in _run("ip", "netns", "pids", _space(name)).split()}
        return [process for process in psutil.process_iter(["cmdline", "ppid"]) if process.pid in pids]

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """A node without its network, while the block runs."""
        _run("ip", "-n", _space(name), "link", "set", "eth0", "down")
        try:
            yield
        finally:
            _run("ip", "-n", _space(name), "link", "set", "eth0", "up")

    def shape(self, name: str, megabits: int) -> None:
        """Let a node send no faster, from now on."""
        limit = ("rate", f"{megabits}mbit", "burst", "64kb", "latency", "200ms")
        _run("tc", "-n", _space(name), "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)

    def unshape(self, name: str) -> None:
        """Let it send as fast as it can again."""
        _run("tc", "-n", _space(name), "qdisc", "del", "dev", "eth0", "root")

    def call(
        self, *words: str, environment: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, from outside the nodes."""
        result = subprocess.run(
            words,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0 or not check, f"{words}: {result.stdout}{result.stderr}"
        return result

    def submit(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """`sbatch`; the job's number. It prints into `output(job)`."""
        place = f"--output={self.folder}/job-%j.out"
        words = ("sbatch", "--parsable", place, *options, str(script), *arguments)
        return int(self.call(*words, environment=environment).stdout)

    def output(self, job: int) -> str:
        """What a job has printed."""
        file = self.folder / f"job-{job}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def job(self, number: int) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, Reason, NodeList, ..."""
        said = self.call("scontrol", "show", "job", "--oneliner", str(number)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def wait(self, number: int, *states: str, seconds: float = 600, restarts: int = 0) -> dict[str, str]:
        """Return `job(number)` when it is in one of these states, started again `restarts` times or more."""
        end = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job["JobState"] in states and int(job["Restarts"]) >= restarts:
                return job
            over = job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            stands = f"job {number} is {job['JobState']} after {job['Restarts']} restarts, not {states}"
            assert not over and time.monotonic() < end, f"{stands}\n{self.output(number)}"
            time.sleep(0.2)

    def wait_for_requeue(self, number: int, restarts: int = 1, seconds: float = 600) -> None:
        """Return when the job is back in the queue; it then starts soon, and not in two minutes.

        Not in the second in which it ended, which nodes take for the job that they are to kill.
        """
        self.wait(number, "PENDING", seconds=seconds, restarts=restarts)
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now+2")

    def wait_for_line(self, number: int, text: str, seconds: float = 600) -> None:
        """Return when the job has printed `text`."""
        self.wait_until(lambda: text in self.output(number), number, seconds)

    def wait_until(self, true: Callable[[], bool], number: int, seconds: float = 600) -> None:
        """Return when `true()`; with the job's output if it is not in time, or the job has ended before."""
        end = time.monotonic() + seconds
        while not true():
            state = self.job(number)["JobState"]
            alive = state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
            assert alive and time.monotonic() < end, f"job {number} is {state}\n{self.output(number)}"
            time.sleep(0.2)

    def cancel_all(self) -> None:
        """End every job, and wait until the nodes are free."""
        self.call("scancel", "--user=root")
        end = time.monotonic() + 60
        while self.call("squeue", "--noheader").stdout.strip():
            assert time.monotonic() < end, self.call("squeue").stdout
            time.sleep(0.2)

    def _prepare(self) -> None:
        for name in ("state", "disk"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.disk))
        mail = self.folder / "mail"
        mail.write_text(f'#!/bin/sh\necho "$@" >>{self.folder}/mails\n')
        mail.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        addresses = {CONTROLLER: f"{NET}.10"} | {n: f"{NET}.{10 + int(n[1:])}" for n in self.names}
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        (self.folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={addresses[name]} CPUs=128 RealMemory=262144" for name in self.names
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(controller=CONTROLLER, net=NET, folder=self.folder, names=nodes)
        )
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for number, (name, address) in enumerate(addresses.items()):
            _run("ip", "netns", "add", _space(name))
            _run(
                "ip",
                "link",
                "add",
                f"{BRIDGE}{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                _space(name),
            )
            _run("ip", "link", "set", f"{BRIDGE}{number}", "master", BRIDGE, "up")
            _run("ip", "-n", _space(name), "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", _space(name), "link", "set", device, "up")

    def _start(self, name: str, *words: str) -> None:
        """A daemon in the namespaces of its node."""
        host = name if name in self.names else CONTROLLER
        # nsenter, and not `ip netns exec`, which mounts a /sys without cgroups.
        inside = f'mount --bind {self.folder}/hosts /etc/hosts && hostname {host} && exec "$@"'
        command = [
            "nsenter",
            f"--net=/run/netns/{_space(host)}",
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            inside,
            "sh",
        ]
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*command, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_nodes(self) -> None:
        """Return when all nodes are there, and free."""
        end = time.monotonic() + 60
        while True:
            # `idle*` has been resumed, and has not answered yet: it gets no job.
            said = self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False)
            if said.stdout.split() == ["idle"] * len(self.names):
                return
            if time.monotonic() > end:
                logs = [f"{file.name}: {file.read_text()[-2000:]}" for file in self.folder.glob("*.log")]
                raise RuntimeError("\n".join(["Slurm does not come up", said.stdout, said.stderr, *logs]))
            time.sleep(0.2)

    def _end_daemons(self) -> None:
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """While the block runs, the first SIGTERM or SIGHUP is a Ctrl-C, and further ones are nothing: what is
    opened is closed, where Python would end at once."""
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, _: object) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = [(number, signal.signal(number, interrupt)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _space(name: str) -> str:
    return name if name == CONTROLLER else f"eagle-{name}"


def _take_away() -> None:
    """Every process in a namespace of these tests, the namespaces and the bridge."""
    said = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for space in re.findall(r"^(eagle-\S+)", said, re.MULTILINE):
        _kill_inside(space)
        _run("ip", "netns", "del", space)
    # Namespaces whose connections were cut live on for a while, and their links with them.
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for link in re.findall(rf"^\d+: ({BRIDGE}\d*)\b", links, re.MULTILINE):
        subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)


def _kill_inside(name: str) -> None:
    space = name if name.startswith("eagle-") else _space(name)
    while found := _run("ip", "netns", "pids", space).split():
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)


def _run(*words: str) -> str:
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(words)}: {result.stderr.strip()}")
    return result.stdout


def main(arguments: Sequence[str]) -> int:
    """The command line; returns its exit status."""
    if reason := missing():
        print(f"no Slurm for tests here: {reason}")
        return 1
    if arguments:
        with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder), int(arguments[0])) as slurm:
            subprocess.run([os.environ.get("SHELL", "sh")], env=slurm.environment, check=False)
    return 0


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))

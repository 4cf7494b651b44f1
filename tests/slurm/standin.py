"""A small stand-in for Slurm on one machine: `sbatch`, `srun` and `scontrol`, by the name it is called under.

Nodes are processes here, all on localhost. Flags are those of real Slurm that the examples may use; any other
is refused, as Slurm would. State is in the folder STANDIN_DIR: jobs.jsonl (submissions), requeued, and the
file `deliver`, whose appearance makes sbatch send what `--signal=B:USR1@...` asked for.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["STANDIN_DIR"])
SBATCH = {
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "cpus-per-task",
    "gpus-per-node",
    "mem",
    "time",
    "signal",
    "open-mode",
    "output",
    "dependency",
    "kill-on-invalid-dep",
    "partition",
    "account",
    "exclusive",
    "requeue",
    "parsable",
    "export",
    "mail-user",
    "mail-type",
}
SRUN = {
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "nodelist",
    "exclude",
    "overlap",
    "kill-on-bad-exit",
    "cpu-bind",
    "gpu-bind",
    "label",
    "container-image",
    "container-mounts",
    "container-workdir",
}
WITHOUT_VALUE = {"exclusive", "requeue", "parsable", "overlap", "label"}


def parse(arguments: list[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """Options before the first word that is none, and the rest."""
    options = {}
    while arguments and arguments[0].startswith("-"):
        name, _, value = arguments.pop(0).removeprefix("--").partition("=")
        if name not in known:
            sys.exit(f"{Path(sys.argv[0]).name}: unrecognized option '--{name}'")
        if name not in WITHOUT_VALUE and not value:
            value = arguments.pop(0)
        options[name] = value
    return options, arguments


def sbatch(arguments: list[str]) -> int:
    """Record the job; run it here and now unless STANDIN_SUBMIT_ONLY is set."""
    given, (script, *rest) = parse(arguments, SBATCH)
    written = []
    for line in Path(script).read_text().splitlines():
        if line.startswith("#SBATCH "):
            written += line.split()[1:]
        elif line and not line.startswith("#"):
            break
    options = parse(written, SBATCH)[0] | given
    jobs = FOLDER / "jobs.jsonl"
    number = 100 + (len(jobs.read_text().splitlines()) if jobs.exists() else 0)
    with open(jobs, "a") as file:
        record = {"id": number, "options": options, "script": Path(script).name, "arguments": rest}
        file.write(json.dumps(record) + "\n")
    print(number if "parsable" in options else f"Submitted batch job {number}", flush=True)
    if os.environ.get("STANDIN_SUBMIT_ONLY"):
        return 0
    nodes = int(options.get("nodes", 1))
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": f"localhost[1-{nodes}]",
        "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1"),
        "SLURM_CPUS_PER_TASK": options.get("cpus-per-task", "1"),
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }
    job = subprocess.Popen(["bash", script, *rest], env=environment)
    wanted = options.get("signal", "")
    while job.poll() is None:
        if wanted.startswith("B:") and (FOLDER / "deliver").exists():
            (FOLDER / "deliver").unlink()
            job.send_signal(getattr(signal, "SIG" + wanted[2:].partition("@")[0]))
        time.sleep(0.1)
    return job.returncode


def _step(tasks: int, each: int, task: int) -> dict[str, str]:
    """The step's own variables, of nodes n1, n2, ... with `each` tasks."""
    nodes = tasks // each
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NODELIST": f"n[1-{nodes}]",
        "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})",
        "SLURMD_NODENAME": f"n{task // each + 1}",
    }


def srun(arguments: list[str]) -> int:
    """One task a node, here; signals go to all tasks, the worst status comes back."""
    if arguments == ["--help"]:
        print("\n".join(f"--{name}" for name in SRUN))
        return 0
    options, command = parse(arguments, SRUN)
    tasks = int(options.get("ntasks", os.environ["SLURM_JOB_NUM_NODES"]))
    each = max(1, tasks // int(os.environ["SLURM_JOB_NUM_NODES"]))
    running = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "SLURM_PROCID": str(i),
                "SLURM_NODEID": str(i // each),
                "SLURM_LOCALID": str(i % each),
                "SLURM_NTASKS": str(tasks),
                **_step(tasks, each, i),
            },
        )
        for i in range(tasks)
    ]

    def forward(number: int, _) -> None:
        for task in running:
            if task.poll() is None:
                task.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    return max(abs(task.wait()) for task in running)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(["localhost"] * int(os.environ["SLURM_JOB_NUM_NODES"])))
        return 0
    if arguments[:2] == ["show", "job"]:
        tasks = os.environ.get("STANDIN_TASKS", os.environ["SLURM_JOB_NUM_NODES"])
        print(f"JobId={arguments[-1]} JobState=RUNNING Reason=None Restarts=0 NumTasks={tasks}")
        return 0
    if arguments[0] == "update":
        with open(FOLDER / "updates", "a") as file:
            file.write(" ".join(arguments[1:]) + "\n")
        return 0
    if arguments[0] == "requeue":
        (FOLDER / "requeued").write_text(arguments[1])
        return 0
    return 1


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))

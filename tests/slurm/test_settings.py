"""Settings of the Slurm scripts: network, container, names, comments, counts that contradict others."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO

SLURM = REPO / "examples" / "slurm"


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-in's commands first in PATH, which is all of it else that Debian has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (folder / name).write_text(f"#!{sys.executable}\n{(REPO / 'tests/slurm/standin.py').read_text()}")
        (folder / name).chmod(0o755)
    path = {"PATH": f"{folder}:/usr/bin:/bin", "STANDIN_DIR": str(tmp_path), "PYTHON": sys.executable}
    return {**os.environ, **path, "REPO": str(REPO), "PYTHONPATH": str(REPO)}


def bash(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """With `fail`, as the scripts have it."""
    script = f'set -euo pipefail; fail() {{ echo "$1" >&2; exit 2; }}; {script}'
    return subprocess.run(["bash", "-c", script], cwd=REPO, env=environment, capture_output=True, text=True)


PLACE = 'source examples/slurm/place.sh; make_place "$PWD" /logs; printf "%s\\n" "${place[@]}"'
APPTAINER = """#!/bin/bash
echo "apptainer: $*" >>"$STANDIN_DIR/apptainer"
while [[ $1 != *.sif ]]; do shift; done
exec "${@:2}"
"""


def add(commands: dict[str, str], name: str, text: str) -> None:
    file = Path(commands["PATH"].partition(":")[0], name)
    file.write_text(text)
    file.chmod(0o755)


def test_nothing_stands_in_front_of_a_command_by_itself(commands: dict[str, str]) -> None:
    assert bash(PLACE, commands).stdout == "\n"


def test_pyxis(commands: dict[str, str]) -> None:
    """Where srun has its option."""
    said = bash(PLACE, {**commands, "CONTAINER_IMAGE": "docker://x/y", "CONTAINER_MOUNTS": "/data"}).stdout
    mounts = f"--container-mounts={REPO}:{REPO},/logs:/logs,/data"
    place = ["--container-image=docker://x/y", f"--container-workdir={REPO}", mounts]
    assert said.splitlines() == ["container: docker://x/y, with Pyxis", *place]


@pytest.mark.parametrize(("image", "pyxis"), [("/x.sif", True), ("/y.sif", False), ("docker://x", False)])
def test_apptainer(commands: dict[str, str], image: str, pyxis: bool) -> None:
    """For its own images, and where srun has no option for any."""
    add(commands, "apptainer", APPTAINER)
    if not pyxis:
        add(commands, "srun", "#!/bin/sh\necho usage: srun")
    said = bash(PLACE, {**commands, "CONTAINER_IMAGE": image, "SLURM_GPUS_ON_NODE": "8"}).stdout.splitlines()
    assert re.fullmatch(rf"container: {image}, with /\S+/apptainer", said[0])
    assert said[2:] == ["exec", "--nv", "--pwd", str(REPO), "--bind", f"{REPO}:{REPO},/logs:/logs", image]


def test_no_program_for_a_container(commands: dict[str, str]) -> None:
    add(commands, "srun", "#!/bin/sh\necho usage: srun")
    said = bash(PLACE, {**commands, "CONTAINER_IMAGE": "docker://x"})
    assert said.returncode == 2
    assert (
        said.stderr
        == "CONTAINER_IMAGE=docker://x: neither Pyxis (srun --container-image) nor apptainer is here\n"
    )


def test_the_network_is_read_where_the_command_runs(commands: dict[str, str], tmp_path: Path) -> None:
    """In the container, whose environment the command keeps."""
    add(commands, "apptainer", APPTAINER)
    file = tmp_path / "net work.sh"
    # Its last line may be false, as that of a preset is where there is no such network.
    file.write_text("export NCCL_SOCKET_IFNAME=eth$INSIDE\n[[ -d /absent ]] && export FI_PROVIDER=efa\n")
    run = PLACE + '; INSIDE=7 "${place[@]}" sh -c "echo if \\$NCCL_SOCKET_IFNAME"'
    said = bash(run, {**commands, "NETWORK": str(file), "CONTAINER_IMAGE": "/x.sif"})
    assert said.stdout.endswith("\nif eth7\n"), said.stderr
    assert f"{file}:{file} /x.sif" in (tmp_path / "apptainer").read_text()
    missing = bash(PLACE, {**commands, "NETWORK": "/absent"})
    assert missing.stderr.startswith("NETWORK=/absent: cannot read this file on ")


def test_the_presets_of_a_network_are_comments_that_bash_reads() -> None:
    text = (SLURM / "network.sh").read_text()
    assert not [line for line in text.splitlines() if line and not line.startswith("#")]
    presets = "\n".join(re.findall(r"^# (export .*)", text, re.M))
    names = set(re.findall(r"(\w+)=", presets))
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "FI_PROVIDER"} <= names
    set_by_all = bash(presets + "\nenv", {"PATH": os.environ["PATH"]}).stdout
    assert all(f"{name}=" in set_by_all for name in names if name.isupper())


@pytest.mark.parametrize("name", ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", None])
def test_the_flight_recorder(commands: dict[str, str], name: str | None) -> None:
    """By its names of all torch versions, whichever the user sets, with a place for its dumps."""
    show = "source examples/launch.sh; set_environment /logs; env | grep -E '^TORCH_(FR|NCCL)_'"
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
    environment = {key: value for key, value in commands.items() if not key.startswith("TORCH_")}
    said = bash(show, environment | ({name: "50"} if name else {})).stdout
    places = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    assert set(said.splitlines()) == {
        *(f"{key}={50 if name else 2000}" for key in names),
        *(f"{key}=/logs/nccl_trace_rank_" for key in places),
        "TORCH_NCCL_DUMP_ON_TIMEOUT=1",
    }


@pytest.mark.parametrize("name", ["train", "preprocess", "convert"])
def test_every_step_runs_in_its_place(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", (SLURM / f"{name}.sbatch").read_text())
    steps = [line for line in text.splitlines() if "srun --" in line and line[0] != "#"]
    assert steps and all('"${place[@]}"' in line for line in steps)


def train(commands: dict[str, str], config: str = "absent.yaml", **environment: str) -> str:
    """What train.sbatch says on its way to `train.py check`."""
    submit = ["sbatch", "--nodes=2", str(SLURM / "train.sbatch"), config]
    environment = {**commands, "RANK_LOGS": commands["STANDIN_DIR"], **environment}
    return subprocess.run(submit, env=environment, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"STANDIN_TASKS": "16"}, "told 16 tasks, and LAUNCH=torchrun starts 2 on 2 nodes of 8 processes"),
        ({"STANDIN_TASKS": "8", "LAUNCH": "srun"}, "told 8 tasks, and LAUNCH=srun starts 16 on 2 nodes"),
    ],
)
def test_counts_of_tasks_that_contradict_the_nodes(commands, environment, line) -> None:
    assert line in train(commands, **environment)


def test_counts_of_a_job_in_which_sbatch_was_called(commands: dict[str, str]) -> None:
    """They are in the environment, and Slurm says others of this one."""
    inherited = {"SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_NTASKS_PER_NODE": "8"}
    assert train(commands, **inherited).startswith("error: absent.yaml: ")


@pytest.mark.parametrize("processes", ["0", "auto"])
def test_processes_that_are_no_number(commands: dict[str, str], processes: str) -> None:
    said = train(commands, PROCESSES=processes)
    assert said == f"train.sbatch: PROCESSES={processes}: expected a number, of each node's processes\n"


@pytest.mark.parametrize("name", ["MAX_REQUEUES", "MAX_RESTARTS", "GRACE_SECONDS", "PREFLIGHT_SECONDS"])
def test_settings_that_are_no_number(commands: dict[str, str], name: str) -> None:
    """At once, and not when a run has failed after days."""
    assert train(commands, **{name: "ten"}) == f"train.sbatch: {name}=ten: expected a whole number\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"), [("PREFLIGHT", "0", "yes or no"), ("EXCLUDE_SLOW", "yes", "0 or 1")]
)
def test_switches_that_are_none(commands: dict[str, str], name: str, value: str, expected: str) -> None:
    assert train(commands, **{name: value}) == f"train.sbatch: {name}={value}: expected {expected}\n"


@pytest.mark.parametrize("name", ["train", "preprocess", "convert"])
def test_a_job_that_is_none(commands: dict[str, str], tmp_path: Path, name: str) -> None:
    """Started without sbatch, or from another folder: a line that says what to do."""
    script = ["bash", str(SLURM / f"{name}.sbatch"), "run.yaml"]
    outside = {key: value for key, value in commands.items() if not key.startswith("SLURM_")}
    done = subprocess.run(script, env=outside, capture_output=True, text=True)
    assert done.returncode and re.fullmatch(
        f"{name}.sbatch: this is a job of Slurm: sbatch {name}.sbatch .*\n", done.stderr
    )
    elsewhere = {**commands, "REPO": str(tmp_path), "SLURM_JOB_ID": "1"}
    done = subprocess.run(script, env=elsewhere, capture_output=True, text=True)
    assert done.returncode and re.fullmatch(
        f"{name}.sbatch: {tmp_path} on .* is not this repository: call sbatch there, or set REPO\n",
        done.stderr,
    )


def test_a_chain_where_there_is_no_slurm(commands: dict[str, str], tmp_path: Path) -> None:
    for name in ("bash", "env", "dirname", "hostname"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    chain = [str(SLURM / "progressive.sh"), "run.yaml"]
    done = subprocess.run(chain, env=commands | {"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("progressive.sh: no sbatch on ")


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "16", "LAUNCH": "srun"}])
def test_counts_of_tasks_that_do_not(commands, environment) -> None:
    environment["PYTHON"] = "false"  # the check would be next
    assert train(commands, **environment) == ""


@pytest.mark.parametrize(
    ("statuses", "how"),
    [
        ((2,), "mistake"),
        ((1, 0), "failed"),  # of the first node, and not of the last
        ((127, 0), "failed"),
        ((1, 1), "mistake"),  # of both
        ((0, 4, 4), "failed"),  # the preflight's processes, of which one has lost the first one
        ((0, 2, 2), "mistake"),
    ],
)
def test_a_node_where_no_python_starts_is_not_a_mistake(
    commands: dict[str, str], tmp_path: Path, statuses: tuple[int, ...], how: str
) -> None:
    """Only what was found to be one ends the job; else it goes back to the queue."""
    add(
        commands,
        "python",
        f"""#!/bin/bash
        echo "$*" >>{tmp_path}/calls
        statuses=({" ".join(map(str, statuses))})
        exit ${{statuses[$(wc -l <{tmp_path}/calls) - 1]}}""",
    )
    (tmp_path / "run.yaml").touch()
    said = train(commands, str(tmp_path / "run.yaml"), PYTHON="python", PROCESSES="1", LAUNCH="srun")
    (start,) = map(json.loads, (tmp_path / "history-100.jsonl").read_text().splitlines())
    assert (start["how"], (tmp_path / "requeued").exists()) == (how, how == "failed"), said
    blamed = statuses[-1] == 0
    assert start["excluded"] == "localhost" * blamed
    assert ("bad node: localhost: tools/train.py check ended with status" in said) == blamed


def test_name_and_comment_of_a_job(commands: dict[str, str], tmp_path: Path) -> None:
    """Of the stage that has written last."""
    for number, stage in enumerate(("one", "two")):
        logs = tmp_path / "blue" / stage / "logs"
        logs.mkdir(parents=True)
        (logs / "metrics.jsonl").write_text('{"iteration": 7, "loss": 1.0}\n{"iteration": 8, "loss": 1.0}\n')
        os.utime(logs / "metrics.jsonl", (number, number))
    (tmp_path / "outcome").write_text("started 0\nsaved 5\n")
    runs = [
        f"{tmp_path}/blue/{stage}: DP2; {total} iterations of 2 x 256"
        for stage, total in (("one", 20), ("two", 30))
    ]
    (tmp_path / "checked-7").write_text("\n".join([*runs, "  a layout: 3 iterations of it"]))
    script = "logs=$STANDIN_DIR outcome=$logs/outcome; source examples/slurm/comment.sh; name_job; comment"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "megatron-eagle"}
    assert bash(script, {**commands, **job}).returncode == 0
    name, comment = (tmp_path / "updates").read_text().splitlines()
    assert name == "JobId=7 JobName=eagle-one"
    assert comment == "JobId=7 Comment=iteration 8 of 30, saved 5"
    bash(script, {**commands, **job, "SLURM_JOB_NAME": "mine"})
    assert "JobName" not in (tmp_path / "updates").read_text().splitlines()[2]

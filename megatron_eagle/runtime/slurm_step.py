"""The processes of `srun`: what torchrun would tell each of them, from the variables of its step.

Only a step's own variables count: those of the job (SLURM_NTASKS, SLURM_PROCID, ...) also stand in the batch
script, where one process runs.
"""

import re
from collections.abc import Mapping

from megatron_eagle.errors import UserError

_NEEDED = ("PROCID", "LOCALID", "NODEID", "STEP_NODELIST", "STEP_TASKS_PER_NODE", "JOB_ID", "STEP_ID")


def step_processes(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, ... of this process, to be added to the environment.

    Nothing in a process that torchrun has started or that was told RANK and WORLD_SIZE in another way, and
    outside a step of several processes.

    Raises:
        UserError: the variables contradict each other, or do not say where the processes meet.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1 or "TORCHELASTIC_RUN_ID" in environment:
        return {}
    step = f"srun has started {tasks} processes"
    rank, processes = environment.get("RANK"), environment.get("WORLD_SIZE")
    if (rank is None) != (processes is None):
        given, absent = ("RANK", "WORLD_SIZE") if processes is None else ("WORLD_SIZE", "RANK")
        raise UserError(f"{step}, and {given} is set but not {absent}: unset it, and both come from the step")
    missing = [f"SLURM_{name}" for name in _NEEDED if not environment.get(f"SLURM_{name}")]
    if rank is not None:
        if processes == str(tasks) and rank != environment.get("SLURM_PROCID", rank):
            raise UserError(
                f"{step}, and RANK={rank} contradicts SLURM_PROCID={environment['SLURM_PROCID']}: unset RANK "
                "and WORLD_SIZE, and both come from the step"
            )
        return {}
    if missing:
        raise UserError(f"{step}, and {', '.join(missing)} are not set: does a container hide them?")
    said = {name: environment[f"SLURM_{name}"] for name in _NEEDED}
    if int(environment.get("SLURM_HET_SIZE", 1)) > 1:
        raise UserError(f"{step} in a heterogeneous job, whose parts do not know of each other: use torchrun")
    if "MASTER_ADDR" not in environment and environment.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        raise UserError(f"{step} in an arbitrary order: name the host of the first one, MASTER_ADDR")
    known = {
        "RANK": said["PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if _sees_one_gpu(environment) else said["LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_per_node(said["STEP_TASKS_PER_NODE"])[int(said["NODEID"])]),
        "MASTER_ADDR": first_host(said["STEP_NODELIST"]),
        # Below the ports that the system gives away; steps of one job side by side have different ones.
        "MASTER_PORT": str(20000 + (int(said["JOB_ID"]) + 1009 * int(said["STEP_ID"])) % 10000),
    }
    return {name: value for name, value in known.items() if name not in environment}


def step_nodes(environment: Mapping[str, str]) -> dict[str, int]:
    """The nodes of this step -> their processes; none where no step says."""
    nodes, tasks = (environment.get(f"SLURM_STEP_{name}") for name in ("NODELIST", "TASKS_PER_NODE"))
    if nodes is None or tasks is None:
        return {}
    return dict(zip(host_names(nodes), _tasks_per_node(tasks), strict=True))


def _sees_one_gpu(environment: Mapping[str, str]) -> bool:
    """Whether Slurm shows this process its own GPU and no other: --gpus-per-task=1, --gpu-bind=single:1."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return environment.get("SLURM_GPUS_PER_TASK") == "1" or ("," not in visible and visible != "")


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it."""
    return host_names(nodes)[0]


def host_names(nodes: str) -> list[str]:
    """`rack[1-2]n[04-05,11],login1` -> rack1n04, rack1n05, rack1n11, rack2n04, ..., login1."""
    names = []
    for part in re.split(r",(?![^\[]*\])", nodes):
        fixed, *rest = re.split(r"\[([^\]]*)\]", part)
        found = [fixed]
        for ranges, after in zip(rest[::2], rest[1::2], strict=True):
            found = [name + number + after for name in found for number in _numbers(ranges)]
        names += found
    return names


def _numbers(ranges: str) -> list[str]:
    """`04-05,11` -> 04, 05, 11."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts

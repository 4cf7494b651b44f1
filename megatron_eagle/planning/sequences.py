"""Packs per sequence side by side: what a step of one layout takes with 1, 2, 4 and 8 packs end to end.

To the estimate of a layout (`step_time`), which knows mean packs, this adds what depends on how packs differ:
whole global batches of the data's packs are dealt as the loader deals them, and a step waits for the group
that has most attention and encoding to do. Packs that are not known are taken as equal, and nobody waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_eagle.data.packing.balance import deal, pack_costs
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import patch_cost
from megatron_eagle.planning.memory_model import StageMemory, fullest_stage
from megatron_eagle.planning.planner import LayoutPlan, PackShape, run_workload
from megatron_eagle.planning.rates import Machine
from megatron_eagle.planning.step_time import StepTime, step_time
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.run_config import RunConfig

PACKS_PER_SEQUENCE = (1, 2, 4, 8)
BATCHES = 16  # global batches that are dealt, at most


@dataclass(frozen=True)
class SequencePlan:
    """A layout with so many packs a sequence."""

    packs: int
    data_parallel_size: int
    memory: StageMemory  # of the stage that needs most
    time: StepTime
    waiting: float  # seconds of a step in which the mean rank waits for the group that has most to do
    fits: bool

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.total + self.waiting


def sequence_plans(
    config: RunConfig, plan: LayoutPlan, gpus: int, packs: PackShape, machine: Machine
) -> list[SequencePlan]:
    """`plan` with each number of packs a sequence that is legal there."""
    found = []
    for together in PACKS_PER_SEQUENCE:
        parallel = plan.parallel
        if together > 1 and parallel.vision_sharding == "none":
            parallel = replace(parallel, vision_sharding="cp")
        data = replace(config.data, packs_per_sequence=together)
        try:
            replace(config, data=data, parallel=parallel).validate(gpus)
        except UserError:
            continue
        found.append(_sequence_plan(config, parallel, together, plan.capacity, gpus, packs, machine))
    return found


def _sequence_plan(
    config: RunConfig,
    parallel: ParallelConfig,
    together: int,
    capacity: float,
    gpus: int,
    packs: PackShape,
    machine: Machine,
) -> SequencePlan:
    joined = parallel.joined(together)
    data_parallel_size = joined.data_parallel_size(gpus)
    microbatches = config.training.global_batch_size // (data_parallel_size * together)
    uneven, tiles = _deal_batches(config, packs, data_parallel_size, together)
    workload = replace(
        run_workload(config, packs, microbatches, machine.multiprocessors),
        sequence_length=together * config.data.length,
        tiles=tiles,
    )
    time = step_time(
        config.model,
        joined,
        data_parallel_size,
        workload,
        mean_tiles=together * packs.mean_tiles,
        sum_squared_lengths=together * packs.sum_squared_lengths,
        machine=machine,
        document_bounds=_end_to_end(packs, config.data.length, together),
    )
    memory = fullest_stage(config.model, joined, data_parallel_size, workload)
    waiting = (uneven - 1) * (time.attention + time.vision)
    return SequencePlan(together, data_parallel_size, memory, time, waiting, memory.total <= capacity)


def _deal_batches(
    config: RunConfig, packs: PackShape, data_parallel_size: int, together: int
) -> tuple[float, int]:
    """Attention and encoding of the group that has most over the mean, and the most tiles of a sequence."""
    batch = config.training.global_batch_size
    if len(packs.squares) < batch:
        return 1.0, together * packs.tiles
    patches = np.asarray(packs.pack_tiles) * config.model.vision.num_patches
    costs = pack_costs(np.asarray(packs.squares), patches, patch_cost(config.model))
    order = np.random.default_rng(config.data.seed).permutation(len(costs))
    uneven, tiles = [], 0
    for start in range(0, len(costs) - batch + 1, batch)[:BATCHES]:
        numbers = order[start : start + batch]
        groups = deal(costs[numbers], data_parallel_size, together)
        loads = [sum(costs[numbers[sequence]].sum() for sequence in group) for group in groups]
        uneven.append(max(loads) / np.mean(loads))
        tiles = max(
            tiles,
            *(int(np.asarray(packs.pack_tiles)[numbers[s]].sum()) for group in groups for s in group),
        )
    return float(np.mean(uneven)), tiles


def _end_to_end(packs: PackShape, length: int, together: int) -> list[list[int]]:
    """Document bounds of sequences of typical packs."""
    bounds: Sequence[Sequence[int]] = packs.document_bounds or [(0, length)]
    sequences = []
    for first in range(len(bounds)):
        members = [bounds[(first + place) % len(bounds)] for place in range(together)]
        ends = [place * length + end for place, own in enumerate(members) for end in own[1:]]
        sequences.append([0, *ends])
    return sequences


def sequence_records(plans: Sequence[SequencePlan]) -> list[dict[str, Any]]:
    """All numbers for JSON: bytes and seconds."""
    return [
        {
            "packs": plan.packs,
            "data_parallel_size": plan.data_parallel_size,
            "fits": plan.fits,
            "seconds": {"total": plan.seconds, "waiting": plan.waiting, **plan.time.parts},
            "memory": plan.memory.total,
        }
        for plan in plans
    ]


def render_sequences(plans: Sequence[SequencePlan]) -> str:
    """The plans as lines, and which is quickest."""
    if len(plans) < 2:
        return "data.packs_per_sequence: no other number than 1 is legal there"
    lines = ["data.packs_per_sequence of the first layout:"]
    for plan in plans:
        lines.append(
            f"  {plan.packs}: {plan.seconds:.3g} s a step (waiting for the costliest group "
            f"{100 * plan.waiting / plan.seconds:.1f} %, keys and heads "
            f"{100 * plan.time.context_parallel / plan.seconds:.1f} %), {plan.memory.total / 1e9:.1f} GB"
            + ("" if plan.fits else ", which is too much")
        )
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        lines.append(f"  quickest: {min(fitting, key=lambda plan: plan.seconds).packs}")
    return "\n".join(lines)

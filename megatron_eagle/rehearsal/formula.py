"""The planner's memory of a rank that is rehearsed, for the packs that it is given."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from megatron_eagle.data.loading.packs import TokenPack
from megatron_eagle.planning.memory_model import StageMemory, peak_memory
from megatron_eagle.planning.memory_shapes import Workload
from megatron_eagle.planning.planner import PackShape, run_workload
from megatron_eagle.rehearsal.gpu_types import find_gpu_type
from megatron_eagle.rehearsal.kinds import RankGrid
from megatron_eagle.rehearsal.packs import MadeUp
from megatron_eagle.training.run_config import RunConfig

MARGIN = 0.03  # what a rehearsed peak may have more


def sequence_workload(config: RunConfig, gpu: str, microbatches: int, packs: Sequence[TokenPack]) -> Workload:
    """What a rank computes whose sequences are all `packs` end to end."""
    lengths = [end - start for pack in packs for start, end in pairwise(pack.document_bounds)]
    tiles = sum(pack.n_tiles for pack in packs)
    shape = PackShape(tiles, tiles, max(lengths), sum(float(length) ** 2 for length in lengths))
    workload = run_workload(config, shape, microbatches, find_gpu_type(gpu).multiprocessors)
    return replace(workload, sequence_length=config.data.sequence_length)


def sequence_memory(
    config: RunConfig, gpu: str, gpus: int, stage: int, microbatches: int, packs: Sequence[TokenPack]
) -> StageMemory:
    """The fullest moment of such a rank of pipeline stage `stage`."""
    workload = sequence_workload(config, gpu, microbatches, packs)
    replicas = config.layout.data_parallel_size(gpus)
    return peak_memory(config.model, config.layout, replicas, workload, stage)


def rank_memory(
    config: RunConfig, gpu: str, gpus: int, rank: int, microbatches: int, loader: MadeUp
) -> StageMemory:
    """Of `rank`, whose sequences differ: as if all were the one that takes most."""
    at = RankGrid(config.layout, gpus, len(loader.kinds)).place(rank)
    sequences = (loader.packs(config.data, at.dp, number) for number in range(microbatches))
    found = [sequence_memory(config, gpu, gpus, at.pp, microbatches, packs) for packs in sequences]
    return max(found, key=lambda memory: memory.total)

"""Parallel layout and its process groups. Megatron's global getters are called here and nowhere else."""

import contextlib
import copy
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Literal

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel import random as megatron_random

from megatron_eagle.errors import UserError
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.ring_groups import RingGroups, make_ring_groups

VisionSharding = Literal["none", "cp", "cp_tp"]
KeyComm = Literal["auto", "gather", "ranges", "ring"]
ContextParallelComm = Literal["auto", "gather", "ranges", "ring", "p2p", "all_gather", "a2a", "a2a+p2p"]
_MOST_RANKS = 1024  # of an axis
_AXES = ("tp", "pp", "cp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp")  # of `Mesh`, in Megatron's words
# Megatron's words (cp_comm_type) in this project's. Heads are divided by ulysses_parallel_size, whatever the
# word.
_KEY_COMM: dict[ContextParallelComm, KeyComm] = {
    "auto": "auto",
    "gather": "gather",
    "ranges": "ranges",
    "ring": "ring",
    "p2p": "ring",
    "all_gather": "gather",
    "a2a": "auto",
    "a2a+p2p": "ring",
}


@dataclass
class ParallelConfig(Ranged):
    """Sizes of the parallel axes, in Megatron's words. Data parallelism takes what is left."""

    tensor_model_parallel_size: Annotated[int, Range(1, 1024)] = 1  # ranks that divide each layer's matrices
    # What tensor parallelism repeats on its ranks (norms, residuals) is divided along the tokens.
    sequence_parallel: bool = False
    pipeline_model_parallel_size: Annotated[int, Range(1, 1024)] = 1  # ranks that hold consecutive layers
    # Pieces of the language model on each pipeline rank; null: one.
    virtual_pipeline_model_parallel_size: Annotated[int, Range(1, 1024)] | None = None
    context_parallel_size: Annotated[int, Range(1, 1024)] = 1  # ranks that divide the tokens of a pack
    # Which tokens of a pack each context parallel rank holds (context_parallel/layout.py, balanced.py): the
    # paper's zigzag over the pack, or placement by the work in its documents, in chunks.
    context_parallel_layout: Literal["contiguous", "zigzag", "zigzag_per_document", "balanced"] = "balanced"
    # Tokens of such a chunk; null: 64, fewer for short packs.
    context_parallel_chunk_size: Annotated[int, Range(1, 2**31 - 1)] | None = None
    # Fill every document up to a multiple of 2 * context_parallel_size tokens, for layers.attention te. Packs
    # then differ in length.
    pad_documents: bool = False
    # Adjacent context parallel ranks that divide heads around attention (context_parallel/ulysses.py); the
    # others exchange KV.
    ulysses_parallel_size: Annotated[int, Range(1, 1024)] = 1
    # How their keys travel (context_parallel/exchange_choice.py): all gathered by all, the needed ranges
    # alone, or round a ring; auto takes for each pack what it estimates to be the quickest. Megatron's
    # cp_comm_type words are taken, too.
    context_parallel_comm: ContextParallelComm = "auto"
    # Memory that gathered keys and their gradients may take on a GPU under auto, in GB of 10^9 bytes: packs
    # that need more go round the ring.
    context_parallel_key_gb: Annotated[float, Range(0, 10_000)] = 4.0
    # Of a ring: so many adjacent ranks, those of a node say, gather each block among them, and blocks go
    # round the nodes.
    ring_node_size: Annotated[int, Range(1, 1024)] = 1
    # Language layers of the first pipeline stage, which also has the vision encoder; null: as many as the
    # others. The other stages share the rest equally.
    num_layers_in_first_pipeline_stage: Annotated[int, Range(1, 1024)] | None = None
    # Of the last one, which also has the loss; null: as many as the others.
    num_layers_in_last_pipeline_stage: Annotated[int, Range(1, 1024)] | None = None
    # Or every stage's own, in Megatron's letters, virtual stages behind each other: "Et|tt|tt|tL" has the
    # embedding and the vision encoder (E), language layers (t) and the loss (L); "(tt|)*3" is tt|tt|tt|.
    pipeline_model_parallel_layout: str | None = None
    # Wait for the device after each message between stages, as torch before 1.13 needed it; not with virtual
    # stages.
    batch_p2p_sync: bool = False
    # Ranks that divide the experts of each layer among them: adjacent ones, of the tensor, context and data
    # parallel ranks of a pipeline stage.
    expert_model_parallel_size: Annotated[int, Range(1, 1024)] = 1
    # Ranks that divide each expert's matrices: 1 or tensor_model_parallel_size; null: that, as Megatron does.
    expert_tensor_parallel_size: Annotated[int, Range(1, 1024)] | None = None
    # Which ranks divide the vision tiles of a pack (context_parallel/vision_sharding.py).
    vision_sharding: VisionSharding = "cp"
    # Reduce gradients over data parallel ranks, bucket by bucket, during the last backward.
    overlap_grad_reduce: bool = False
    # Gather updated parameters, bucket by bucket, during the next step's first forward.
    overlap_param_gather: bool = False
    # With virtual stages: at the same time on all pipeline stages.
    align_param_gather: bool = False
    # Transformer Engine sends sequence parallel rows beside the products that need them.
    tp_comm_overlap: bool = False
    # Accumulate and reduce gradients in fp32; false: in the type of the parameters.
    grad_reduce_in_fp32: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pipeline_model_parallel_layout is not None:
            self._read_layout(self.pipeline_model_parallel_layout)
        if self.virtual_pipeline_model_parallel_size == 1:  # Megatron would take one chunk for interleaving
            self.virtual_pipeline_model_parallel_size = None
        if self.context_parallel_comm == "a2a" and self.ulysses_parallel_size == 1:
            self.ulysses_parallel_size = self.context_parallel_size

    @property
    def packs(self) -> int:
        """Packs that the context parallel ranks hold end to end."""
        return 1

    def joined(self, packs: int) -> "ParallelConfig":
        """The layout whose groups take `packs` packs as one sequence: so many times as many context parallel
        ranks.

        Raises:
            UserError: more than there may be.
        """
        if packs == 1:
            return self
        one = self.context_parallel_size
        if packs * one > _MOST_RANKS:
            raise UserError(
                f"data.packs_per_sequence {packs} x parallel.context_parallel_size {one} = {packs * one} "
                f"context parallel ranks: at most {_MOST_RANKS}"
            )
        values = vars(self) | {"context_parallel_size": packs * one}
        if self.context_parallel_comm == "a2a" and self.ulysses_parallel_size == one:
            values["ulysses_parallel_size"] = packs * one
        return _JoinedLayout(**values, packs=packs)

    @property
    def key_comm(self) -> KeyComm:
        """`context_parallel_comm` in this project's words."""
        return _KEY_COMM[self.context_parallel_comm]

    @property
    def model_parallel_size(self) -> int:
        """Processes that one replica of the model takes."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that divide each expert's matrices."""
        given = self.expert_tensor_parallel_size
        return self.tensor_model_parallel_size if given is None else given

    def expert_data_ranks(self, replicas: int) -> int:
        """Ranks that have copies of the same parts of the same experts.

        Args:
            replicas: ranks that have copies of the other layers: data x context parallel ones.
        """
        ranks = replicas * self.tensor_model_parallel_size  # of a pipeline stage
        return ranks // (self.expert_tensor_size * self.expert_model_parallel_size)

    @property
    def hierarchical_context_parallel_sizes(self) -> list[int] | None:
        """Ranks that divide heads around attention, and ranks that exchange keys; None: all exchange keys."""
        if self.ulysses_parallel_size == 1:
            return None
        return [self.ulysses_parallel_size, self.context_parallel_size // self.ulysses_parallel_size]

    def key_ranks_per_node(self, ranks_per_node: int) -> int:
        """Adjacent ranks on one node, of those that exchange keys; 1 where nodes begin anywhere among them.

        Args:
            ranks_per_node: of all ranks.
        """
        inner = self.tensor_model_parallel_size * self.ulysses_parallel_size
        group = self.tensor_model_parallel_size * self.context_parallel_size
        if ranks_per_node % group == 0:
            return group // inner
        if group % ranks_per_node or ranks_per_node % inner:
            return 1
        return ranks_per_node // inner

    @property
    def num_model_chunks(self) -> int:
        """Chunks of the model on each pipeline rank (virtual pipeline stages)."""
        return self.virtual_pipeline_model_parallel_size or 1

    def stage_layers(self, layers: int) -> list[list[int]]:
        """How many of the `layers` of the language model each stage has in each of its chunks, where
        `layout_rules` has found that they can be cut so."""
        stages, chunks = self.pipeline_model_parallel_size, self.num_model_chunks
        if self.pipeline_model_parallel_layout is not None:
            parts = [
                part.count("t") for part in unrolled_layout(self.pipeline_model_parallel_layout).split("|")
            ]
            return [parts[stage::stages] for stage in range(stages)]
        first, last = self.num_layers_in_first_pipeline_stage, self.num_layers_in_last_pipeline_stage
        between = stages - (first is not None) - (last is not None)
        share = (layers - (first or 0) - (last or 0)) // between if between else 0
        sizes = [share] * stages
        if first is not None:
            sizes[0] = first
        if last is not None:
            sizes[-1] = last
        return [[size // chunks] * chunks for size in sizes]

    def _read_layout(self, layout: str) -> None:
        unrolled, stages = unrolled_layout(layout), self.pipeline_model_parallel_size
        what = f"pipeline_model_parallel_layout is {layout!r}"
        if others := set(unrolled) - set("EtL|"):
            raise ValueError(
                f"{what}: {''.join(sorted(others))!r} stands for nothing "
                "of this model, which has E, t and L, in stages with | between them"
            )
        parts = unrolled.count("|") + 1
        if parts % stages:
            raise ValueError(
                f"{what}: {parts} parts are no multiple of pipeline_model_parallel_size {stages}"
            )
        chunks, given = parts // stages, self.virtual_pipeline_model_parallel_size
        if given not in (None, chunks):
            raise ValueError(
                f"{what}: {parts} parts make {chunks} virtual stages of "
                f"{stages}, and virtual_pipeline_model_parallel_size is {given}: leave it out"
            )
        self.virtual_pipeline_model_parallel_size = chunks

    def forwards_in_flight(self, stage: int) -> int:
        """Most forwards of model chunks that wait for their backward on a rank of pipeline stage `stage`.

        Those of the warm-up of Megatron's schedules, and one.
        """
        stages, after = self.pipeline_model_parallel_size, self.pipeline_model_parallel_size - stage - 1
        if self.num_model_chunks == 1:
            return after + 1
        return 2 * after + (self.num_model_chunks - 1) * stages + 1

    def data_parallel_size(self, world_size: int, experts: int | None = None) -> int:
        """Replicas of the model among `world_size` processes.

        Args:
            experts: of each layer; None: not looked at.
        Raises:
            UserError: no process, sizes that contradict each other, or a world that they do not divide.
        """
        if world_size < 1:
            raise UserError(f"the number of processes is {world_size}: must be at least 1")
        if self.context_parallel_size % self.ulysses_parallel_size:
            raise UserError(
                f"parallel.ulysses_parallel_size {self.ulysses_parallel_size} does not divide "
                f"{self.shown_context}: choose one of its divisors"
            )
        self._check_key_comm()
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError(
                "parallel.sequence_parallel needs tensor_model_parallel_size > 1 "
                "(it splits the sequence over the tensor parallel ranks): set it to false"
            )
        if self.num_model_chunks > 1 and self.pipeline_model_parallel_size == 1:
            raise UserError(
                "parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1: "
                "remove it or add pipeline stages"
            )
        replica = self.model_parallel_size // self.packs
        sizes = (
            f"tensor {self.tensor_model_parallel_size} x pipeline {self.pipeline_model_parallel_size} x "
            f"context {self.context_parallel_size // self.packs}"
        )
        if world_size % replica:
            raise UserError(
                f"{world_size} processes cannot hold {sizes} = {replica}: start a multiple of {replica} "
                "processes"
            )
        self._check_experts(world_size, experts)
        replicas = world_size // replica
        if replicas % self.packs:
            raise UserError(
                f"data.packs_per_sequence {self.packs} does not divide {replicas}, the data parallel size of "
                f"{world_size} processes with 1: choose {_nearest_divisors(replicas, self.packs)}"
            )
        return replicas // self.packs

    def _check_experts(self, world_size: int, number: int | None) -> None:
        """Whether the ranks of a pipeline stage can be divided anew for the experts, and these by them."""
        size, given = self.expert_model_parallel_size, self.expert_tensor_parallel_size
        tensor = self.tensor_model_parallel_size
        if given not in (None, 1, tensor):
            choices = [str(size) for size in dict.fromkeys((1, tensor))]
            raise UserError(
                f"parallel.expert_tensor_parallel_size {given} divides an expert's matrices otherwise than "
                f"tensor_model_parallel_size {tensor} the others: choose {' or '.join(choices)}"
            )
        # Of a stage: `world_size` is a multiple of tensor x pipeline x context, as was looked for.
        whole = world_size // self.pipeline_model_parallel_size // self.expert_tensor_size
        both = whole if number is None else math.gcd(whole, number)
        if both % size == 0:
            return
        if number is not None and number % size:
            problem = f"parallel.expert_model_parallel_size {size} does not divide the {number} experts"
        else:
            problem = (
                f"{world_size} processes cannot be divided into expert tensor {self.expert_tensor_size} x "
                f"expert {size} x pipeline {self.pipeline_model_parallel_size}"
            )
        nearest = _nearest_divisors(both, size)
        raise UserError(f"{problem}: choose parallel.expert_model_parallel_size {nearest}")

    def _check_key_comm(self) -> None:
        word, ulysses, size = (
            self.context_parallel_comm,
            self.ulysses_parallel_size,
            self.context_parallel_size,
        )
        if word == "a2a" and ulysses != size:
            raise UserError(
                f"parallel.context_parallel_comm a2a divides heads over all {size} context parallel ranks, "
                f"and ulysses_parallel_size is {ulysses}: set it to {size}, or the comm to auto"
            )
        if word == "a2a+p2p" and not 1 < ulysses < size:
            raise UserError(
                f"parallel.context_parallel_comm a2a+p2p divides heads over some of the {size} context "
                f"parallel ranks, and ulysses_parallel_size is {ulysses}: choose a divisor between 1 and "
                f"{size}, or the comm auto"
            )
        keys, node = size // ulysses, self.ring_node_size
        if node > 1 and self.key_comm != "ring":
            raise UserError(
                f"parallel.ring_node_size {node} is of a ring and context_parallel_comm is {word}: set that "
                "to ring, or ring_node_size to 1"
            )
        if keys % node:
            legal = max(n for n in range(1, node + 1) if keys % n == 0)
            raise UserError(
                f"parallel.ring_node_size {node} does not divide the {keys} ranks that exchange keys "
                f"({self.shown_context} / ulysses_parallel_size {ulysses}): the nearest is {legal}"
            )

    @property
    def shown_context(self) -> str:
        """The context parallel ranks in the words of a run's settings."""
        if self.packs == 1:
            return f"context_parallel_size {self.context_parallel_size}"
        one = self.context_parallel_size // self.packs
        return f"data.packs_per_sequence {self.packs} x context_parallel_size {one}"


def _nearest_divisors(number: int, size: int) -> str:
    """Those of `number` next to `size`, which is none, in words."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below, above = ([n for n in divisors if n < size], [n for n in divisors if n > size])
    return " or ".join(map(str, below[-1:] + above[:1]))


@dataclass
class _JoinedLayout(ParallelConfig):
    """No section of a run's file: made by `ParallelConfig.joined`."""

    packs: int = 1


def unrolled_layout(layout: str) -> str:
    """Megatron's letters with its repetitions, "(tt|)*3" and "t*3", written out."""
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(pattern, lambda found: found[1] * int(found[2]), layout.replace(",", ""))
    return layout


@dataclass(frozen=True)
class Axis:
    """This process's place on one parallel axis."""

    group: torch.distributed.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: torch.distributed.ProcessGroup) -> "Axis":
        return cls(group, group.rank(), group.size())


@dataclass(frozen=True)
class Mesh:
    """The process groups of one layout, passed to whoever communicates."""

    config: ParallelConfig
    groups: ProcessGroupCollection
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    dp_cp: Axis
    ep: Axis  # ranks that have other experts
    expt_tp: Axis  # ranks that have other parts of the same experts
    expt_dp: Axis  # ranks that have the same parts of the same experts
    alone: torch.distributed.ProcessGroup  # this rank
    ring: RingGroups
    ranks_per_node: int  # the fewest of any node

    def is_first_stage(self, chunk: int = 0) -> bool:
        """Whether model chunk `chunk` of this rank holds the vision encoder and the embedding."""
        return self.pp.rank == 0 and chunk == 0

    def is_last_stage(self, chunk: int | None = None) -> bool:
        """Whether model chunk `chunk` (default: the last) of this rank computes the loss."""
        last = self.config.num_model_chunks - 1
        return self.pp.rank == self.pp.size - 1 and (last if chunk is None else chunk) == last

    @property
    def speaks_for_replica(self) -> bool:
        """True on one rank of each replica of the model, for what all its ranks know and is to be counted
        once: tensor and context rank 0 of the last pipeline stage."""
        return self.is_last_stage() and self.tp.rank == 0 and self.cp.rank == 0


@contextlib.contextmanager
def model_parallel(config: ParallelConfig, *, seed: int = 1234) -> Iterator[Mesh]:
    """Create the process groups of `config` over the default group; give everything back at the end.

    Afterwards, also after an error, Megatron's globals and the random states are what they were, and groups
    that were created inside, by whomever, are destroyed: the next layout finds nothing of this one.

    Args:
        seed: of Megatron's model-parallel random states (dropout; parameters have their own seed).
    Raises:
        UserError: as `ParallelConfig.data_parallel_size`, or another layout is active in this process.
    """
    config.data_parallel_size(torch.distributed.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        raise UserError("a model-parallel layout is active in this process: use another process for this")
    with (
        _groups_destroyed(),
        _globals_restored(parallel_state),
        _globals_restored(megatron_random),  # a flag that an error inside a recomputed layer leaves
        _random_states_restored(),
    ):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            hierarchical_context_parallel_sizes=config.hierarchical_context_parallel_sizes,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=config.expert_tensor_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(seed)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        axes = {name: Axis.of(getattr(groups, name)) for name in _AXES}
        ring = RingGroups(None)
        if (
            config.key_comm in ("auto", "ring")
            and config.context_parallel_size > config.ulysses_parallel_size
        ):
            ring = make_ring_groups(
                config.tensor_model_parallel_size,
                config.pipeline_model_parallel_size,
                config.context_parallel_size,
                config.ulysses_parallel_size,
                config.ring_node_size,
            )
        yield Mesh(config, groups, **axes, alone=_alone(groups), ring=ring, ranks_per_node=_ranks_per_node())


def _alone(groups: ProcessGroupCollection) -> torch.distributed.ProcessGroup:
    """A group of this rank; those of experts are such groups where nobody divides them."""
    own: torch.distributed.ProcessGroup = groups.ep
    if own.size() > 1:
        own = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    return own


def _ranks_per_node() -> int:
    """As torchrun tells each process; without it all are on one node. Collective over all ranks."""
    processes = torch.distributed.get_world_size()
    found = [0] * processes
    torch.distributed.all_gather_object(found, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    return min(found)


@contextlib.contextmanager
def _globals_restored(module: ModuleType) -> Iterator[None]:
    # Whatever the module holds, not a list of names: Megatron 0.16.1's `destroy_model_parallel` forgets 13.
    state = vars(module)
    before = {
        name: copy.copy(value) if isinstance(value, dict | list | set) else value
        for name, value in state.items()
    }
    try:
        yield
    finally:
        for name in [name for name in state if name not in before]:
            del state[name]
        state.update(before)


@contextlib.contextmanager
def _random_states_restored() -> Iterator[None]:
    tracker = get_cuda_rng_tracker()
    device = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(device):
        try:
            yield
        finally:
            tracker.reset()


@contextlib.contextmanager
def _groups_destroyed() -> Iterator[None]:
    # torch has no public list of its groups; Megatron looks at this one, too.
    existing = torch.distributed.distributed_c10d._world.pg_map
    before = set(existing)
    with contextlib.ExitStack() as youngest_first:  # the same order on every rank
        try:
            yield
        finally:
            for group in existing:
                if group not in before:
                    youngest_first.callback(torch.distributed.destroy_process_group, group)

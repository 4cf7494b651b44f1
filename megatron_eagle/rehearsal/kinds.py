"""Which ranks of a job differ: each stands for those that do exactly what it does.

Ranks are numbered in Megatron's order: tensor, context, data, pipeline parallel; the first changes fastest.
Data parallel ranks differ by their packs; tensor parallel ones by being the first, or by their tiles.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import ParallelConfig, unrolled_layout
from megatron_eagle.training.run_config import RunConfig


@dataclass(frozen=True)
class Place:
    """A rank by its numbers on the axes."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class RankGrid:
    """All ranks of a job. Data parallel rank d has the same packs as rank d % `pack_classes`."""

    parallel: ParallelConfig
    world_size: int
    pack_classes: int

    @property
    def sizes(self) -> Place:
        """Of the axes."""
        p = self.parallel
        return Place(
            p.tensor_model_parallel_size,
            p.context_parallel_size,
            p.data_parallel_size(self.world_size),
            p.pipeline_model_parallel_size,
        )

    def microbatches(self, config: RunConfig) -> int:
        """Of a step, on each data parallel rank."""
        return config.training.global_batch_size // self.sizes.dp // config.data.packs_per_sequence

    def rank(self, place: Place) -> int:
        """Of the job."""
        n = self.sizes
        return place.tp + n.tp * (place.cp + n.cp * (place.dp + n.dp * place.pp))

    def place(self, rank: int) -> Place:
        """Where a rank is."""
        n = self.sizes
        rest, tp = divmod(rank, n.tp)
        rest, cp = divmod(rest, n.cp)
        pp, dp = divmod(rest, n.dp)
        return Place(tp, cp, dp, pp)

    @property
    def replicas(self) -> range:
        """Data parallel ranks that have packs of their own."""
        return range(min(self.pack_classes, self.sizes.dp))

    @property
    def played(self) -> range:
        """Data parallel ranks whose messages are matched: those, and where ranks divide experts as many as
        have all experts together."""
        n, parallel = self.sizes, self.parallel
        if not self._divides_experts:
            return self.replicas
        each, ranks = n.tp * n.cp, parallel.expert_model_parallel_size * parallel.expert_tensor_size
        together = math.lcm(each, ranks) // each
        return range(min(n.dp, math.lcm(together, len(self.replicas))))

    @property
    def _divides_experts(self) -> bool:
        return self.parallel.expert_model_parallel_size > 1

    def talks_like(self, rank: int) -> int:
        """The rank that sends and receives what `rank` does, from its own place. One with other experts may
        get a row more."""
        at, n = self.place(rank), self.sizes
        own = at.tp == 0 or self._divides_experts or self.parallel.vision_sharding == "cp_tp"
        return self.rank(replace(at, tp=at.tp if own else n.tp - 1, dp=at.dp % len(self.played)))

    def speakers(self) -> list[int]:
        """Ranks that every other one talks like."""
        return sorted({self.talks_like(rank) for rank in self.kept()})

    def kept(self) -> list[int]:
        """All ranks of the replicas that are played."""
        n = self.sizes
        places = product(range(n.tp), range(n.cp), self.played, range(n.pp))
        return sorted(self.rank(Place(*place)) for place in places)

    def distinct(self, replicas: Iterable[int]) -> list[int]:
        """Every stage's first and last ranks of the tensor and context parallel axes, of these replicas."""
        n = self.sizes
        ends = {0, n.tp - 1}, {0, n.cp - 1}
        places = product(*ends, replicas, range(n.pp))
        return sorted(self.rank(Place(*place)) for place in places)


def rehearsed_microbatches(parallel: ParallelConfig, microbatches: int) -> int:
    """As many as a pipeline needs to be full, of those that a step has; two without one."""
    stages = parallel.pipeline_model_parallel_size
    enough = 2 * stages
    return min(microbatches, enough)


def cut_depth(config: RunConfig) -> RunConfig:
    """The run with few layers: two in each chunk of its pipeline, or fewer as its stages' letters say, and
    two in the encoder."""
    parallel, model = config.parallel, config.model
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_model_chunks
    each = 2 * chunks
    layers = each * stages
    if parallel.pipeline_model_parallel_layout is not None:
        letters = re.sub("t{3,}", "tt", unrolled_layout(parallel.pipeline_model_parallel_layout))
        parallel, layers = replace(parallel, pipeline_model_parallel_layout=letters), letters.count("t")
    if parallel.num_layers_in_first_pipeline_stage is not None:
        parallel = replace(parallel, num_layers_in_first_pipeline_stage=each)
    if parallel.num_layers_in_last_pipeline_stage is not None:
        parallel = replace(parallel, num_layers_in_last_pipeline_stage=each)
    if layers >= model.text.num_hidden_layers:
        layers, parallel = model.text.num_hidden_layers, config.parallel
    cut: EagleConfig = replace(
        model,
        text=replace(model.text, num_hidden_layers=layers),
        vision=replace(model.vision, num_hidden_layers=min(2, model.vision.num_hidden_layers)),
    )
    kept = {name: value for name, value in vars(config).items() if name != "notes"}
    return RunConfig(**kept | {"model": cut, "parallel": parallel})

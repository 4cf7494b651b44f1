"""Which layouts a number of GPUs allows for a run, how long each would take, and whether it fits. No GPU.

Legality is `RunConfig.validate`'s, the same rules with the same words as at the start of training; memory
and time are estimates from shapes (`memory_model`, `step_time`).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from megatron_eagle.config import apply_overrides, from_dict, load_yaml
from megatron_eagle.context_parallel.ulysses import divides_heads
from megatron_eagle.data.loading.follow import FollowedPacks
from megatron_eagle.data.loading.loader import DataConfig, open_packs
from megatron_eagle.data.packing.index import Packs
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig, expand_preset
from megatron_eagle.planning.memory_model import StageMemory, fullest_stage, offloaded_bytes
from megatron_eagle.planning.memory_shapes import Workload
from megatron_eagle.planning.rates import Machine
from megatron_eagle.planning.stage_balance import balanced_layers, layout_letters
from megatron_eagle.planning.step_time import StepTime, end_costs, step_time
from megatron_eagle.runtime.parallel import ParallelConfig, VisionSharding
from megatron_eagle.training.run_config import RunConfig, RunFile, load_run_config, stated_positions

# Left out of what a layout may fill: the CUDA context, NCCL's buffers and the caching allocator's gaps. An
# allowance, not a measurement.
RESERVED_BYTES = 4e9
# Virtual stages that are tried with balanced stages: more make a pipeline shorter by ever less.
_BALANCED_CHUNKS = (1, 2, 4)


@dataclass(frozen=True)
class PackShape:
    """What the packs of a data set are like."""

    tiles: int  # the most in one pack: memory must hold it
    mean_tiles: float
    longest_document: int  # tokens
    sum_squared_lengths: float  # of a pack's documents, mean over packs
    document_bounds: tuple[tuple[int, ...], ...] = ()  # of typical packs; none: one document each
    squares: tuple[float, ...] = ()  # of all packs: their documents' squared lengths, summed; none: equal
    pack_tiles: tuple[int, ...] = ()  # of all packs

    @classmethod
    def of_data(cls, data: DataConfig) -> "PackShape":
        """From a packed token store; of one that is followed, from its first window.

        Raises:
            UserError: no store, or not packed for its length; no window of it is there.
        """
        store, packs = open_packs(data)
        if isinstance(packs, FollowedPacks) and not packs.reach(1):
            raise UserError(f"the shape of packs is not known before there is {packs.awaited()}")
        numbers = np.arange(len(packs))
        tiles, squares = (packs.column(name, numbers) for name in ("n_tiles", "sum_squares"))
        lengths = store.column("n_tokens").to_numpy()
        bounds = sample_bounds(lengths, packs, data.length, 8)
        each = tuple(squares.astype(float).tolist()), tuple(tiles.tolist())
        return cls(
            int(tiles.max()), float(tiles.mean()), int(lengths.max()), float(squares.mean()), bounds, *each
        )

    @classmethod
    def assumed(cls, length: int, tokens_per_tile: int, tiles: int | None = None) -> "PackShape":
        """One document a pack, half of it image tokens unless `tiles` says otherwise."""
        tiles = length // (2 * tokens_per_tile) if tiles is None else tiles
        return cls(tiles, tiles, length, float(length) ** 2)

    def with_tiles(self, tiles: int) -> "PackShape":
        """The same with `tiles` in every pack."""
        each = (tiles,) * len(self.pack_tiles)
        return replace(self, tiles=tiles, mean_tiles=tiles, pack_tiles=each)


def sample_bounds(tokens: np.ndarray, packs: Packs, length: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Document bounds of `count` packs of `length` tokens or of all, evenly spread; padding is a document.

    Args:
        tokens: of each row of the store.
    """
    bounds = []
    for pack in np.linspace(0, len(packs) - 1, min(count, len(packs))).astype(int):
        ends = tokens[packs.rows(int(pack))].cumsum().tolist()
        bounds.append((0, *ends) if ends[-1] == length else (0, *ends, length))
    return tuple(bounds)


@dataclass(frozen=True)
class LayoutPlan:
    """One legal layout with its estimates."""

    parallel: ParallelConfig
    data_parallel_size: int
    microbatches: int  # of a step on each data parallel rank
    memory: StageMemory  # of the stage that needs most
    time: StepTime
    capacity: float  # bytes that a layout may fill
    host_memory: int  # bytes per GPU that offloaded layers take, on the fullest stage

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity

    @property
    def limit(self) -> str:
        """What to look at to better this layout: the memory that is too much, or the time that is lost."""
        if not self.fits:
            name, size = max(self.memory.parts.items(), key=lambda part: part[1])
            return f"memory: {name} {size / 1e9:,.0f} GB at the {self.memory.moment}"
        losses = {k: v for k, v in self.time.parts.items() if k not in ("matrix_products", "vision")}
        name, seconds = max(losses.items(), key=lambda part: part[1])
        return f"{name.replace('_', ' ')} {100 * seconds / self.time.total:.0f} %"

    @property
    def _order(self) -> tuple[Any, ...]:
        p = self.parallel
        layout = (
            p.model_parallel_size,
            p.pipeline_model_parallel_size,
            p.tensor_model_parallel_size,
            p.num_model_chunks,
            p.ulysses_parallel_size,
            p.expert_model_parallel_size,
            p.num_layers_in_first_pipeline_stage or 0,
            p.pipeline_model_parallel_layout or "",
            p.vision_sharding,
            p.sequence_parallel,
        )
        return not self.fits, self.time.total if self.fits else self.memory.total, self.memory.total, layout


@dataclass(frozen=True)
class LayoutPlans:
    """All layouts of a number of GPUs."""

    legal: list[LayoutPlan]  # those that fit, fastest first, then the others, smallest first
    refused: Counter[str]  # reason -> layouts

    @property
    def fitting(self) -> list[LayoutPlan]:
        return [plan for plan in self.legal if plan.fits]


def file_run(path: str, overrides: Iterable[str]) -> RunConfig:
    """The run of a YAML file for any number of GPUs: its layout is read but not checked against them.

    Raises:
        UserError: as `load_run_config`.
    """
    overrides = list(overrides)
    config = load_run_config(path, [*overrides, "parallel={}"], world_size=1)
    own = apply_overrides(load_yaml(path), overrides).get("parallel")
    config.parallel = from_dict(ParallelConfig, own or {}, "parallel")
    return config


def preset_run(name: str, length: int, global_batch_size: int, overrides: Iterable[str]) -> RunConfig:
    """A run of a model preset without data.

    Raises:
        UserError: no such preset, or a wrong override.
    """
    nowhere = {"path": "nowhere"}  # nothing is read or written
    values = {
        "model": {"preset": name},
        "data": nowhere | {"length": length},
        "training": {"train_iterations": 1, "global_batch_size": global_batch_size},
        "checkpoint": nowhere,
    }
    values = apply_overrides(values, overrides)
    stated = stated_positions(values["model"])
    if isinstance(values["model"], dict):  # from_dict says what is wrong with anything else
        values["model"] = expand_preset(values["model"])
    run = from_dict(RunFile, values)
    rows = run.model.text.vocab_size
    if rows is None:
        raise UserError(f"preset {name} takes its vocabulary from data: add model.text.vocab_size=N")
    image_token = run.model.image_token_index or 0  # nothing is read: any will do
    return run.complete(run.model.with_data(vocab_size=rows, image_token_index=image_token), stated=stated)


def plan_layouts(
    config: RunConfig, gpus: int, gpu_memory: float, packs: PackShape, machine: Machine
) -> LayoutPlans:
    """Try every layout of `gpus` GPUs with `gpu_memory` bytes each for the run `config`.

    The sizes in `config.parallel` play no part; a sequence is one pack (`sequences.py` has others).

    Raises:
        UserError: less than one GPU, no memory beyond `RESERVED_BYTES`, more tiles than a pack holds, or no
            legal layout at all.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}: must be at least 1")
    if not RESERVED_BYTES < gpu_memory < math.inf:  # nan neither
        raise UserError(
            f"--gpu-memory is {gpu_memory / 1e9:g} GB: must be above the {RESERVED_BYTES / 1e9:g} GB that "
            "the CUDA context, NCCL and the allocator take"
        )
    if packs.tiles * config.model.tokens_per_tile > config.data.length:
        raise UserError(
            f"{packs.tiles} tiles of {config.model.tokens_per_tile} tokens do not fit a pack of "
            f"{config.data.length} tokens: at most {config.data.length // config.model.tokens_per_tile}"
        )
    config = replace(config, data=replace(config.data, packs_per_sequence=1))
    legal, refused = [], Counter[str]()
    for parallel in [*_own_stages(config, gpus), *_candidates(config, gpus)]:
        try:
            replace(config, parallel=parallel).validate(gpus)
        except UserError as error:
            refused[str(error)] += 1
            continue
        if parallel.pipeline_model_parallel_layout is not None and parallel != config.parallel:
            parallel = _balanced(config, parallel, gpus, packs, machine)
            sizes = parallel.stage_layers(config.model.text.num_hidden_layers)
            if _said_by_sizes(sizes) or parallel == config.parallel:
                continue  # a candidate of its own
        legal.append(_plan(config, parallel, gpus, gpu_memory - RESERVED_BYTES, packs, machine))
    if not legal:
        reason, count = refused.most_common(1)[0]
        raise UserError(
            f"no legal layout on {gpus} GPUs; {count} of {refused.total()} refused because {reason}"
        )
    return LayoutPlans(sorted(legal, key=lambda plan: plan._order), refused)


def run_workload(
    config: RunConfig, packs: PackShape, microbatches: int, multiprocessors: int = Workload.multiprocessors
) -> Workload:
    """What every data parallel rank of a run computes on GPUs in `microbatches` packs."""
    return Workload(
        sequence_length=config.data.length,
        tiles=packs.tiles,
        microbatches=microbatches,
        precision=config.training.precision,
        longest_document=packs.longest_document,
        recompute=config.recompute,
        trainable=config.optimizer.trainable,
        lora=config.lora,
        fused_loss=config.layers.loss != "plain",  # auto takes it on a GPU
        loss_into_main_grad=config.layers.loss_into_main_grad,
        eager=config.layers.kernels == "eager",
        multiprocessors=multiprocessors,
        deterministic=config.training.deterministic,
    )


def _plan(
    config: RunConfig,
    parallel: ParallelConfig,
    gpus: int,
    capacity: float,
    packs: PackShape,
    machine: Machine,
) -> LayoutPlan:
    replicas, workload = _shares(config, parallel, gpus, packs, machine)
    memory = fullest_stage(config.model, parallel, replicas, workload)
    time = step_time(config.model, parallel, replicas, workload, **_counted(packs), machine=machine)
    stages = range(parallel.pipeline_model_parallel_size)
    host = max(offloaded_bytes(config.model, parallel, workload, stage) for stage in stages)
    return LayoutPlan(parallel, replicas, workload.microbatches, memory, time, capacity, host)


def _balanced(
    config: RunConfig, parallel: ParallelConfig, gpus: int, packs: PackShape, machine: Machine
) -> ParallelConfig:
    """The same stages with as many layers each as makes them take equally long."""
    replicas, workload = _shares(config, parallel, gpus, packs, machine)
    ends = end_costs(config.model, parallel, replicas, workload, **_counted(packs), machine=machine)
    return replace(parallel, pipeline_model_parallel_layout=_letters(config.model, parallel, *ends))


def _letters(eagle: EagleConfig, parallel: ParallelConfig, first: float = 0.0, last: float = 0.0) -> str:
    sizes = parallel.pipeline_model_parallel_size, parallel.num_model_chunks
    return layout_letters(balanced_layers(eagle.text.num_hidden_layers, *sizes, first, last))


def _said_by_sizes(chunks: list[list[int]]) -> bool:
    """Whether a first stage of at most the others' size, all in equal chunks, is the same."""
    first, *others = chunks
    equal = all(len(set(stage)) == 1 for stage in chunks) and all(stage == others[0] for stage in others)
    return equal and first[0] <= others[0][0]


def _shares(
    config: RunConfig, parallel: ParallelConfig, gpus: int, packs: PackShape, machine: Machine
) -> tuple[int, Workload]:
    """Data parallel size, and what each of its ranks computes."""
    replicas = parallel.data_parallel_size(gpus)
    microbatches = config.training.global_batch_size // replicas
    return replicas, run_workload(config, packs, microbatches, machine.multiprocessors)


def _counted(packs: PackShape) -> dict[str, Any]:
    return {
        "mean_tiles": packs.mean_tiles,
        "sum_squared_lengths": packs.sum_squared_lengths,
        "document_bounds": packs.document_bounds,
    }


def _own_stages(config: RunConfig, gpus: int) -> list[ParallelConfig]:
    """The run's layout, where its stages are none that are tried: a last one of its own size, or letters."""
    own = config.parallel
    given = (
        own.num_layers_in_last_pipeline_stage is not None or own.pipeline_model_parallel_layout is not None
    )
    return [own] if given and gpus % own.model_parallel_size == 0 else []


def _candidates(config: RunConfig, gpus: int) -> Iterator[ParallelConfig]:
    """Every combination of sizes whose product divides `gpus`, legal or not, the same layout only once.

    A first stage of its own size is tried where it is smaller than the others' share (it has the encoder), or
    where the layers have no equal shares. Stages in letters stand for those that are balanced.
    """
    layers, heads = config.model.text.num_hidden_layers, config.model.text.num_key_value_heads
    queries = config.model.text.num_attention_heads
    sizes = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for tp in sizes:
        for pp in (n for n in sizes if (gpus // tp) % n == 0 and n <= layers):
            for cp in (n for n in sizes if (gpus // tp // pp) % n == 0):
                shardings = _shardings(tp, cp)
                ulysses_sizes = [
                    n
                    for n in sizes
                    if cp % n == 0
                    and (n <= heads or (heads % tp == 0 and divides_heads(n, queries // tp, heads // tp)))
                ]
                expert_sizes = _expert_sizes(config, gpus // pp, tp)
                for parallel in _variants(config, tp, pp):
                    for sharding, ulysses, (experts, parts) in product(
                        shardings, ulysses_sizes, expert_sizes
                    ):
                        yield replace(
                            parallel,
                            context_parallel_size=cp,
                            ulysses_parallel_size=ulysses,
                            vision_sharding=sharding,
                            expert_model_parallel_size=experts,
                            expert_tensor_parallel_size=parts,
                        )


def _expert_sizes(config: RunConfig, ranks: int, tp: int) -> list[tuple[int, int | None]]:
    """(Expert parallel size, their tensor parallel size) for the `ranks` of a pipeline stage: whole experts,
    or divided as the run's file says."""
    experts, parts = config.model.text.experts, config.parallel.expert_tensor_parallel_size
    if experts is None:
        return [(1, None)]
    parts = 1 if parts in (None, 1) else tp
    legal = (n for n in range(1, experts.num_experts + 1) if experts.num_experts % n == 0)
    return [(n, parts) for n in legal if ranks % (n * parts) == 0]


def _shardings(tp: int, cp: int) -> list[VisionSharding]:
    found: list[VisionSharding] = ["none"]
    if cp > 1:
        found.append("cp")
    if tp > 1:
        found.append("cp_tp")
    return found


def _variants(config: RunConfig, tp: int, pp: int) -> Iterator[ParallelConfig]:
    """With and without sequence parallelism, virtual stages, a first stage of its own size, or letters.

    What else the run's layout says stays.
    """
    layers = config.model.text.num_hidden_layers
    share = -(-layers // pp)
    base = replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_in_last_pipeline_stage=None,
        pipeline_model_parallel_layout=None,
    )
    # Experts would get every token from each rank: they need it.
    both = (True,) if config.model.text.experts is not None else (False, True)
    for sequence_parallel in both if tp > 1 else (False,):
        for chunks in range(1, share + 1) if pp > 1 else (1,):
            stages = replace(
                base,
                sequence_parallel=sequence_parallel,
                virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
                num_layers_in_first_pipeline_stage=None,
            )
            yield stages
            if pp == 1:
                continue
            for first in range(chunks, share, chunks):
                yield replace(stages, num_layers_in_first_pipeline_stage=first)
            if chunks in _BALANCED_CHUNKS and pp * chunks - 2 <= layers:
                yield replace(stages, pipeline_model_parallel_layout=_letters(config.model, stages))

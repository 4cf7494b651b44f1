"""One rank of a real training step under torch's memory profiler, for the check of the memory model.

The profiler records every allocation and release of the process from before the model is built; the
running sum of those events is what the rank holds, to the byte, and its maximum during the second step
(whose optimizer states exist from the start) is the measured peak.
"""

import itertools

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_eagle.model.eagle import ModelInput, build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.language import Targets
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, wrap_models
from megatron_eagle.training.schedule import run_schedule

_STEP = "measured step"


def measure_step(
    eagle: EagleConfig,
    parallel: dict,
    length: int,
    tiles: int,
    microbatches: int,
    precision: str,
    recompute: RecomputeConfig,
    layers: LayersConfig,
    document: int | None,
) -> dict:
    """Train two steps on made-up packs -> bytes and counts of this rank.

    Args:
        parallel: of `ParallelConfig`.
        length: tokens of a pack.
        tiles: of a pack.
        microbatches: packs of a step, over all data parallel ranks.
        document: tokens of each document of a pack; None: one document.

    Returns:
        peak: largest number of bytes held during the second step.
        before: bytes held when it begins (weights, gradients, optimizer states, buffers).
        parameters: elements of all parameters of this rank.
    """
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            models = build_model(eagle, mesh, torch.device("cpu"), dtype, recompute, layers)
            initialize_parameters(models, seed=1)
            parameters = sum(p.numel() for model in models for p in model.parameters())
            wrapped = wrap_models(models)
            optimizer = build_optimizer(OptimizerConfig(lr=1e-4), wrapped)
            packs = [made_up_pack(eagle, length, tiles, seed, document) for seed in range(microbatches)]
            _step(eagle, mesh, wrapped, optimizer, packs)
            with record_function(_STEP):
                _step(eagle, mesh, wrapped, optimizer, packs)
        return held_during(profiler, _STEP) | {"parameters": parameters}


def made_up_pack(eagle: EagleConfig, length: int, tiles: int, seed: int, document: int | None = None) -> dict:
    """Keyword arguments of `make_input`: documents of `document` tokens (None: one); it begins with `tiles`
    tiles."""
    bounds = [*range(0, length, document or length), length]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, eagle.text.vocab_size, (length,), generator=generator)
    ids[: tiles * eagle.tokens_per_tile] = eagle.image_token_index
    size = eagle.vision.image_size
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)]),
        "document_bounds": bounds,
        "targets": Targets(
            torch.cat([ids[1:], ids[:1]]), torch.full((length,), 1 / length), torch.zeros_like(ids)
        ),
        "pixel_values": torch.rand(tiles, 3, size, size, generator=generator) * 2 - 1,
    }


def _step(eagle: EagleConfig, mesh: Mesh, models: list, optimizer, packs: list[dict]) -> None:
    """As `training.trainer` does it."""
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()

    def build(pack: dict) -> ModelInput[Targets]:
        pixels = pack["pixel_values"] if mesh.pp.rank == 0 else None
        return make_input(eagle, mesh, torch.device("cpu"), **(pack | {"pixel_values": pixels}))

    share = len(packs) // mesh.dp.size
    own = packs[mesh.dp.rank * share : (mesh.dp.rank + 1) * share]
    run_schedule(models, mesh, own, build, length=len(packs[0]["input_ids"]))
    optimizer.step()


def held_during(profiler: profile, name: str) -> dict:
    """`before` the profiled function `name` and at its `peak`: bytes held."""
    events = profiler.profiler.kineto_results.events()
    (step,) = [event for event in events if event.name() == name]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held, before, peak = 0, 0, 0
    for time, change in changes:
        held += change
        if time < step.start_ns():
            before = held
        elif time <= step.end_ns():
            peak = max(peak, held)
    return {"peak": peak, "before": before}

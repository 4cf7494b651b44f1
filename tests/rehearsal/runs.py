"""Small runs of several layouts, rehearsed here and recorded on gloo."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.planning.planner import preset_run
from megatron_eagle.rehearsal.messages import RankMessage, Recorder, Wait
from megatron_eagle.rehearsal.packs import MadeUp
from megatron_eagle.rehearsal.patches import applied
from megatron_eagle.rehearsal.rank import RankReport, rehearsed_config, without_saves
from megatron_eagle.rehearsal.session import Job, run_jobs
from megatron_eagle.rehearsal.values import even_choice
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.setup import open_run
from megatron_eagle.training.trainer import Trainer
from tests.parallel import harness

LENGTH = 256


def small_run(
    parallel: dict[str, Any],
    *,
    recompute: str | None = None,
    text: dict[str, Any] | None = None,
    **sections: Any,
) -> RunConfig:
    """Four language layers for pipelines, the fused loss as on GPUs, and no peak to ask for.

    Args:
        text: of the language model besides.
    """
    sizes = {"vocab_size": 504, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    settings = [f"model.text.{name}={json.dumps(value)}" for name, value in (sizes | (text or {})).items()]
    config = preset_run("tiny", LENGTH, 1, settings)
    config = replace_in(config, parallel=ParallelConfig(**parallel), **sections)
    layers = replace(config.layers, loss="fused")
    logging = replace(config.logging, peak_tflops=1.0)
    if recompute is not None:
        config = replace_in(config, recompute=RecomputeConfig(language=recompute))
    return replace_in(config, layers=layers, logging=logging)


def replace_in(config: RunConfig, **changed: Any) -> RunConfig:
    """`dataclasses.replace`, for a class with notes of its own."""
    return RunConfig(**{name: value for name, value in vars(config).items() if name != "notes"} | changed)


def rehearsed(
    config: RunConfig,
    world_size: int,
    microbatches: int = 2,
    *,
    ranks: Sequence[int] | None = None,
    before: Callable[[], None] | None = None,
) -> list[RankReport]:
    """All ranks' reports, or those of `ranks`; a rank that fails is an error."""
    loader = MadeUp(config.model)
    jobs = [
        Job(config, "h100", rank, world_size, loader, microbatches, before)
        for rank in (range(world_size) if ranks is None else ranks)
    ]
    reports = run_jobs(jobs, 2)
    for report in reports:
        assert report.failure is None, report.failure
    return reports


def recorded(config: RunConfig, world_size: int, microbatches: int = 2) -> list[list[tuple[Any, ...]]]:
    """What each rank of a real run on gloo tells others."""
    return harness.launch(_record, world_size, config, microbatches)


def _even_topk(scores: torch.Tensor, k: int, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Routers choose as in a rehearsal."""
    which = even_choice(scores.shape[0], k, scores.shape[1])
    return scores.gather(dim, which), which


def _record(config: RunConfig, microbatches: int) -> list[tuple[Any, ...]]:
    import torch.distributed as dist

    recorder, data_parallel = Recorder(), config.layout.data_parallel_size(dist.get_world_size())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hf").mkdir()
        run_config = rehearsed_config(config, folder, microbatches, data_parallel)
        with (
            applied([*recorder.patches(), (torch.Tensor, "topk", _even_topk)]),
            recorder,
            open_run(run_config, MadeUp(config.model)) as run,
        ):
            Trainer(run, without_saves(run, Observer())).train()
    return said(recorder.events)


def said(events: Sequence[RankMessage | Wait]) -> list[tuple[Any, ...]]:
    """Messages without their places. The group for the host's tensors is the world where that is gloo's."""
    messages = [event for event in events if isinstance(event, RankMessage)]
    return [
        (("WORLD", 0) if message.group == "HOST" else (message.group, message.nth)) + message.what[2:]
        for message in messages
    ]

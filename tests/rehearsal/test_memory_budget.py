"""No byte of device memory beyond the planner's formula and its margin: full width, few layers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.planning.memory_model import memory_moments
from megatron_eagle.planning.planner import preset_run
from megatron_eagle.rehearsal.formula import rank_memory, sequence_workload
from megatron_eagle.rehearsal.kinds import cut_depth
from megatron_eagle.rehearsal.packs import MadeUp
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.report import sync_counts
from megatron_eagle.rehearsal.session import Job, run_jobs
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.run_config import RunConfig
from tests.parallel.cases import Layout, cell
from tests.rehearsal.budgets import LAYOUTS, MEMORY, SYNCS
from tests.rehearsal.runs import replace_in

GPU, LENGTH = "h100", 32768


def wide_run(layout: Layout, **sections: Any) -> RunConfig:
    """The 8B's layers, few of them."""
    config = preset_run("eagle2.5-8b", LENGTH, 1, [])
    parallel = ParallelConfig(**layout.parallel | {"context_parallel_chunk_size": None})
    return cut_depth(replace_in(config, parallel=parallel, **sections))


def microbatches(config: RunConfig) -> int:
    stages = config.layout.pipeline_model_parallel_size
    return 2 * stages if stages > 1 else 1


def rehearsed(config: RunConfig, gpus: int, *jobs: tuple[int, Callable[[], None] | None]) -> list[RankReport]:
    """A report for each rank and what happens in it first."""
    loader = MadeUp(config.model, ("one document",))
    many = microbatches(config)
    reports = run_jobs([Job(config, GPU, rank, gpus, loader, many, before) for rank, before in jobs], 2)
    for report in reports:
        assert report.failure is None, report.failure
    return reports


def planned(config: RunConfig, gpus: int, rank: int) -> int:
    loader = MadeUp(config.model, ("one document",))
    return rank_memory(config, GPU, gpus, rank, microbatches(config), loader).total


def share(report: RankReport, formula: int) -> float:
    """Of the formula that a rank takes."""
    return report.peak / formula


def hold_and_look(nbytes: int) -> None:
    """A module keeps a tensor, and the host asks for a loss in every microbatch."""
    from megatron_eagle.training import schedule

    original, kept = schedule.megatron_loss, []

    def loss(losses: torch.Tensor, *rest: Any) -> Any:
        if not kept:
            kept.append(torch.empty(nbytes, dtype=torch.uint8, device=losses.device))
        if losses.sum().item() < 0:
            raise ValueError("not a loss")
        return original(losses, *rest)

    schedule.megatron_loss = loss


def test_four_percent_more_and_a_wait_are_noticed() -> None:
    layout = cell("TP2+SP x CP2, cp_tp")
    config = wide_run(layout)
    formula = planned(config, layout.world_size, 0)
    extra = partial(hold_and_look, int(0.04 * formula))
    as_it_is, more = rehearsed(config, layout.world_size, (0, None), (0, extra))
    assert 1 - MEMORY < share(as_it_is, formula) <= 1 + MEMORY
    assert share(more, formula) > 1 + MEMORY
    assert sync_counts([as_it_is])[1] == SYNCS["once a microbatch"]
    assert sync_counts([more])[1] > SYNCS["once a microbatch"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_is_within_the_formula(name: str) -> None:
    layout = cell(name)
    config, gpus = wide_run(layout), layout.world_size
    reports = rehearsed(config, gpus, *((rank, None) for rank in range(gpus)))
    shares = {report.rank: share(report, planned(config, gpus, report.rank)) for report in reports}
    assert all(value <= 1 + MEMORY for value in shares.values()), shares
    assert max(shares.values()) > 1 - MEMORY, "the formula is that of the fullest"


@pytest.mark.slow
@pytest.mark.parametrize("modules", [("mlp",), ("core_attn", "mlp")], ids=str)
def test_an_mlp_that_is_computed_again(modules: tuple[str, ...]) -> None:
    layout = cell("TP2+SP x CP2, cp_tp")
    config = wide_run(layout)
    text = replace(config.model.text, num_hidden_layers=8)
    recompute = RecomputeConfig(language="selective", recompute_modules=modules)
    config = replace_in(config, model=replace(config.model, text=text), recompute=recompute)
    (report,) = rehearsed(config, layout.world_size, (0, None))
    assert abs(share(report, planned(config, layout.world_size, 0)) - 1) < MEMORY
    kept = replace_in(config, recompute=RecomputeConfig(language="selective"))
    assert share(report, planned(kept, layout.world_size, 0)) < 1 - MEMORY


def lora_run(tp: int, **optimizer: Any) -> tuple[RunConfig, MadeUp, dict[str, int]]:
    """Adapters, whose layers wait in host memory; every rank encodes all of as many tiles as fit."""
    sizes = {"tensor_model_parallel_size": tp, "context_parallel_size": 4, "vision_sharding": "none"}
    layout = Layout("", 4 * tp, sizes)
    config = wide_run(layout, lora=LoraConfig(), recompute=RecomputeConfig(language="offload"))
    config = replace_in(config, optimizer=replace(config.optimizer, **optimizer))
    loader = MadeUp(config.model, ("most tiles",))
    workload = sequence_workload(config, GPU, 1, loader.packs(config.data, 0, 0))
    moments = memory_moments(config.model, config.layout, 1, workload, 0)
    return config, loader, {moment.moment: moment.total for moment in moments}


def test_a_frozen_encoder_may_be_the_fullest_moment() -> None:
    frozen = lora_run(2, trainable=("language",))[2]
    assert max(frozen, key=lambda moment: frozen[moment]) == "encoder forward"
    assert "encoder forward" not in lora_run(2)[2]  # where it trains its backward has more


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_frozen_encoder_goes_forward(tp: int) -> None:
    config, loader, moments = lora_run(tp, trainable=("language",))
    (report,) = run_jobs([Job(config, GPU, 0, 4 * tp, loader, 1)], 1)
    assert report.failure is None, report.failure
    assert report.peak == pytest.approx(moments["encoder forward"], rel=5e-3)
    assert report.peak == pytest.approx(max(moments.values()), rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("fp32", [True, False])
def test_the_encoders_gradients_are_joined_as_shards(fp32: bool) -> None:
    """An encoder of full depth trains in short packs: nothing in the microbatches takes as much."""
    layout = Layout("TP2, cp_tp", 4, {"tensor_model_parallel_size": 2, "vision_sharding": "cp_tp"})
    config = wide_run(layout)
    vision = preset_run("eagle2.5-8b", LENGTH, 1, []).model.vision
    config = replace_in(
        config,
        model=replace(config.model, vision=vision),
        data=replace(config.data, length=1024),
        optimizer=replace(config.optimizer, trainable=("vision", "connector")),
        recompute=replace(config.recompute, vision="full"),
        parallel=replace(config.parallel, grad_reduce_in_fp32=fp32),
    )
    packs = MadeUp(config.model, ("one document",)).packs(config.data, 0, 0)
    moments = {
        moment.moment: moment.total
        for moment in memory_moments(
            config.model, config.layout, 2, sequence_workload(config, GPU, 1, packs), 0
        )
    }
    for report in rehearsed(config, 4, (0, None), (2, None)):
        stepped = report.peaks["optimizer"]
        assert stepped.nbytes == pytest.approx(moments["optimizer step"], rel=1e-3)
        if fp32:  # the others' copies for the optimizer, of the step before, are more than half of them
            summed = report.peaks["forward and backward"]
            assert "sum_encoder_gradients" in summed.place
            assert summed.nbytes == pytest.approx(moments["sum of the encoder's gradients"], rel=1e-3)

"""The first layouts of a plan rehearsed: what their fullest rank holds, and how long a step would take."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megatron_eagle.planning.planner import LayoutPlan
from megatron_eagle.rehearsal.packs import MadeUp, UnreadPacks
from megatron_eagle.rehearsal.rehearsal import RehearsalPlan, rehearse
from megatron_eagle.rehearsal.report import layout_words
from megatron_eagle.rehearsal.timeline_report import predict
from megatron_eagle.training.run_config import RunConfig


def rehearse_plans(
    plans: Sequence[LayoutPlan],
    config: RunConfig,
    gpu: str,
    gpus: int,
    *,
    data: bool,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """A line for each layout, when it is done: a rank of every pipeline stage is rehearsed.

    Args:
        config: the run, whose layout plays no part.
        gpu: its type; gpus: their number.
        data: take the run's own packs, not made-up ones of one long document, half of it tiles.
        tell: hears of each rank.
    Raises:
        UserError: a GPU type that cannot be rehearsed, or no compiler.
    """
    loader = UnreadPacks if data else MadeUp(config.model, ("one document",))
    for number, plan in enumerate(plans, 1):
        data_config = replace(config.data, packs_per_sequence=1)  # as layouts are planned
        run = replace(config, parallel=plan.parallel, data=data_config)
        stages = plan.parallel.pipeline_model_parallel_size
        job = RehearsalPlan.of(
            run,
            gpu,
            gpus,
            ranks=[stage * gpus // stages for stage in range(stages)],
            open_loader=loader,
            timeline=True,
        )
        found = rehearse(job, os.cpu_count() or 1, messages=False, tell=tell)
        words = f"{number}: {layout_words(run.layout, gpus)}"
        if found.failures:
            first = found.failures[0]
            yield f"{words}: stopped at rank {first.rank}: {first.stopped_by}"
            continue
        peak = max(report.peak for report in found.reports) / 1e9
        prediction = predict(found)
        assert prediction is not None, "timelines were asked for"
        yield (
            f"{words}: {peak:.3g} GB rehearsed, {plan.memory.total / 1e9:.3g} planned; "
            f"{prediction.seconds:.3g} s predicted, {plan.time.total:.3g} planned; {found.problems} problems"
        )

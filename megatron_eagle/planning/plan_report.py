"""A plan as people read it: one line a layout, why the first is first, what was refused and why."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_eagle.planning.planner import RESERVED_BYTES, LayoutPlan, LayoutPlans, PackShape
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.run_config import RunConfig

# Tensor, sequence, pipeline, virtual and context parallel, Ulysses of that, data parallel, expert parallel of
# a model that has some; language layers of the first stage, and the share of its time that encoder, connector
# and embedding take.
_LAYOUT = ("TP", "SP", "PP", "VPP", "CP", "U", "DP", "EP", "first", "encoder", "vision")
_MEMORY = ("weights", "gradients", "optimizer", "activations", "vision", "logits", "workspace")
_SHORT = ("weight", "grad", "optim", "activ", "vision", "logits", "work")


def render_plan(
    plans: LayoutPlans,
    config: RunConfig,
    packs: PackShape,
    gpus: str,
    rates: str,
    *,
    top: int,
    refusals: bool = False,
) -> str:
    """The plan as text, memory in GB of 10^9 bytes.

    Args:
        gpus: for which.
        rates: what they attain.
        top: at most so many layouts are shown: of those that fit, else the smallest.
        refusals: add every reason for which a layout was refused.
    """
    fitting = plans.fitting
    shown = (plans.legal if refusals else fitting or plans.legal)[:top]
    recompute = config.recompute
    lines = [
        f"{gpus}, packs of {config.data.length:,} tokens, {config.training.global_batch_size} a step, "
        f"{config.training.precision}; {packs.mean_tiles:.4g} tiles a pack ({packs.tiles} at most), "
        f"longest document {packs.longest_document:,}",
        f"positions: max_position_embeddings {config.model.text.max_position_embeddings:,}",
        *config.notes,
        f"recompute: language {recompute.language}, vision {recompute.vision}; "
        f"trained: {', '.join(config.optimizer.trainable)}"
        + ("" if config.lora is None else f", the language model by adapters of rank {config.lora.rank}"),
        rates,
        "assumes a fused attention kernel (on a GPU the reference attention is no choice), no overlap, and "
        f"the {'plain' if config.layers.loss == 'plain' else 'fused'} loss with every token supervised",
        f"{len(fitting)} layouts fit, {len(plans.legal) - len(fitting)} do not, "
        f"{plans.refused.total()} refused",
        "",
        *_table(shown, config.parallel, config.model.text.experts is not None),
        *_stages(shown),
        "",
        _explain(plans.legal[0]),
    ]
    if plans.refused:
        lines += ["", "refused:" if refusals else "refused, one example a rule (--all shows every reason):"]
        reasons = plans.refused if refusals else _by_rule(plans.refused)
        lines += [f"  {count:6,} x {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def _by_rule(refused: Counter[str]) -> Counter[str]:
    """Reasons that differ in numbers alone counted as one, under the words of the first of them."""
    examples: dict[str, str] = {}
    rules: Counter[str] = Counter()
    for reason, count in refused.items():
        rule = re.sub(r"\d+", "N", reason.split(": ")[0])
        rules[examples.setdefault(rule, reason)] += count
    return rules


def as_records(plans: LayoutPlans, config: RunConfig) -> dict[str, Any]:
    """All numbers for JSON: bytes and seconds, layouts best first."""
    layouts = [
        {
            "parallel": asdict(plan.parallel),
            "data_parallel_size": plan.data_parallel_size,
            "microbatches": plan.microbatches,
            "fits": plan.fits,
            "limit": plan.limit,
            "seconds": {"total": plan.time.total, **plan.time.parts},
            "stages": [asdict(stage) for stage in plan.time.stages],
            "mfu": plan.time.mfu,
            "host_memory": plan.host_memory,
            "memory": {
                "total": plan.memory.total,
                "stage": plan.memory.stage,
                "moment": plan.memory.moment,
                **plan.memory.parts,
            },
        }
        for plan in plans.legal
    ]
    refused = [{"reason": reason, "layouts": count} for reason, count in plans.refused.most_common()]
    positions = config.model.text.max_position_embeddings
    return {"max_position_embeddings": positions, "layouts": layouts, "refused": refused}


def _table(plans: list[LayoutPlan], own: ParallelConfig, experts: bool) -> list[str]:
    layout = [name for name in _LAYOUT if experts or name != "EP"]
    rows = [["", *layout, "step s", "MFU", *_SHORT, "GB", "free", "limited by"]]
    for number, plan in enumerate(plans, 1):
        parallel, parts = plan.parallel, plan.memory.parts
        first = plan.time.stages[0]
        rows.append(
            [
                f"{number}{'*' if parallel == own else ''}",
                str(parallel.tensor_model_parallel_size),
                "yes" if parallel.sequence_parallel else "-",
                str(parallel.pipeline_model_parallel_size),
                str(parallel.num_model_chunks),
                str(parallel.context_parallel_size),
                str(parallel.ulysses_parallel_size),
                str(plan.data_parallel_size),
                *([str(parallel.expert_model_parallel_size)] if experts else []),
                str(first.layers) if parallel.pipeline_model_parallel_size > 1 else "-",
                f"{100 * first.encoder / first.total:.0f} %",
                parallel.vision_sharding,
                _seconds(plan.time.total),
                "-" if plan.time.mfu is None else f"{100 * plan.time.mfu:.0f} %",
                *(f"{parts[name] / 1e9:.1f}" for name in _MEMORY),
                f"{plan.memory.total / 1e9:.1f}",
                f"{(plan.capacity - plan.memory.total) / 1e9:.1f}",
                plan.limit,
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _stages(plans: list[LayoutPlan]) -> Iterator[str]:
    """A line for each pipeline: its letters where it has them, layers and seconds of every stage."""
    for number, plan in enumerate(plans, 1):
        stages, letters = plan.time.stages, plan.parallel.pipeline_model_parallel_layout
        if len(stages) > 1:
            layers = ", ".join(str(stage.layers) for stage in stages)
            seconds = ", ".join(_seconds(stage.total) for stage in stages)
            shares = f"{100 * stages[0].encoder / stages[0].total:.0f} % of the first is the encoder's"
            loss = f"{100 * stages[-1].loss / stages[-1].total:.0f} % of the last the loss's"
            name = "" if letters is None else f" pipeline_model_parallel_layout {letters}:"
            yield f"{number}:{name} layers {layers}; {seconds} s a microbatch, {shares}, {loss}"


def _explain(plan: LayoutPlan) -> str:
    memory, total = plan.memory, plan.time.total
    if not plan.fits:
        return (
            f"None fits. The smallest needs {memory.total / 1e9:.1f} GB and {plan.capacity / 1e9:.1f} may be "
            f"filled ({RESERVED_BYTES / 1e9:g} GB are left to CUDA, NCCL and the allocator); {plan.limit}. "
            "More GPUs, recompute.language=full or recompute.vision=full take less."
        )
    parts = sorted(plan.time.parts.items(), key=lambda part: -part[1])
    shares = [(name.replace("_", " "), 100 * seconds / total) for name, seconds in parts]
    spent = ", ".join(f"{name} {share:.0f} %" for name, share in shares if share >= 1)
    return (
        f"First: {_seconds(total)} s = {spent}. Its memory peaks at {memory.total / 1e9:.1f} GB on pipeline "
        f"stage {memory.stage}, at the {memory.moment}; {memory.states / 1e9:.1f} GB are there between steps."
        + (
            f" Offloaded layers take {plan.host_memory / 1e9:.1f} GB of host memory a GPU."
            * (plan.host_memory > 0)
        )
    )


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.2g}"

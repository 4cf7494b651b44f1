"""How long a training step takes under a layout: FLOPs, bytes and attainable rates, nothing overlapped.

An estimate for ranking layouts, not a promise: kernels reach the rates of `rates.py` (those of bf16), every
collective waits for the computation (as the training loop has it now) and latencies are left out. How even
attention is over context parallel ranks, and which keys travel, is counted (`context_work.py`).
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

from eagle_kernels.linear_cross_entropy import CHUNK
from megatron_eagle.model.flops import (
    StepFlops,
    exchange_costs,
    feed_forward_products,
    pair_costs,
    training_flops,
)
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import PackShapes, StageShapes
from megatron_eagle.planning.context_work import ContextWork, context_work
from megatron_eagle.planning.memory_shapes import (
    FP32,
    Workload,
    count_parameters,
    language_layer,
    vision_activations,
)
from megatron_eagle.planning.rates import Machine
from megatron_eagle.runtime.parallel import ParallelConfig

# Flash attention's backward does five matrix products for the forward's two, one more than the gradients
# need (it computes the scores again); training_flops counts twice the forward.
BACKWARD_EXECUTED = 2.5 / 2
# A kept activation is written, read by the forward, read by the backward, its gradient written and read.
ACTIVATION_PASSES = 5


@dataclass(frozen=True)
class StageTime:
    """Seconds of a pipeline stage for one microbatch."""

    layers: int  # of the language model
    total: float
    encoder: float  # of it, on the first stage: encoder, connector and embedding
    loss: float  # of it, on the last stage


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they are spent on."""

    matrix_products: float
    attention: float
    vision: float  # encoder and connector, on the slowest stage
    elementwise: float  # memory traffic of everything that is no matrix product, and the optimizer
    tensor_parallel: float
    context_parallel: float
    expert_parallel: float  # tokens to their experts and back
    data_parallel: float
    pipeline: float  # transfers between stages, and waiting for other stages
    mfu: float | None  # model FLOPs of the step over the bf16 peak of all GPUs; None in fp32
    _stages: Callable[[], tuple[StageTime, ...]]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        names = [each.name for each in fields(self) if each.name not in ("mfu", "_stages")]
        return {name: getattr(self, name) for name in names}

    @cached_property
    def stages(self) -> tuple[StageTime, ...]:
        """Of the pipeline, or one."""
        return self._stages()


def step_time(
    eagle: EagleConfig,
    parallel: ParallelConfig,
    data_parallel_size: int,
    workload: Workload,
    *,
    mean_tiles: float,
    sum_squared_lengths: float,
    machine: Machine,
    document_bounds: Sequence[Sequence[int]] = (),
) -> StepTime:
    """Estimated step of `workload` on `parallel.model_parallel_size * data_parallel_size` GPUs.

    Args:
        mean_tiles: tiles of a pack on average (`workload.tiles` is the most, which memory must hold).
        sum_squared_lengths: squared lengths of a pack's documents, summed, on average.
        document_bounds: of typical packs; none: one document a pack.
    """
    gpus = parallel.model_parallel_size * data_parallel_size
    packs = mean_tiles, sum_squared_lengths, document_bounds
    shapes = PackShapes(eagle, parallel, workload.sequence_length)
    microbatch = _microbatch_of(shapes, gpus, workload, *packs, machine)
    stages = range(parallel.pipeline_model_parallel_size)
    own = [StageShapes.of(shapes, stage) for stage in stages]
    per_stage = [microbatch(stage) for stage in own]
    seconds = [sum(parts.values()) for parts in per_stage]
    slowest = max(stages, key=lambda stage: seconds[stage])
    m = workload.microbatches
    parts = {name: m * value for name, value in per_stage[slowest].items()}
    # The pipeline fills and drains once a step, through one chunk of every other stage.
    parts["pipeline"] += (sum(seconds) - seconds[slowest]) / parallel.num_model_chunks
    reduction, optimizer = _finish(shapes, data_parallel_size, workload, machine)
    parts["elementwise"] += optimizer
    model_flops = training_flops(
        eagle,
        tokens=workload.sequence_length,
        sum_squared_lengths=sum_squared_lengths,
        tiles=mean_tiles,
        trainable=workload.trainable,
        adapters=workload.lora is not None,
    ).total
    total = sum(parts.values()) + reduction
    mfu = m * data_parallel_size * model_flops / (gpus * machine.peak * total)
    known = workload.precision == "bf16"
    return StepTime(
        **parts,
        data_parallel=reduction,
        mfu=mfu if known else None,
        _stages=lambda: tuple(_stage_time(stage, microbatch) for stage in own),
    )


def _stage_time(stage: StageShapes, microbatch: Callable[[StageShapes], dict[str, float]]) -> StageTime:
    def seconds(stage: StageShapes) -> float:
        return sum(microbatch(stage).values())

    total = seconds(stage)
    encoder = total - seconds(replace(stage, first=False)) if stage.first else 0.0
    loss = total - seconds(replace(stage, last=False)) if stage.last else 0.0
    return StageTime(stage.layers, total, encoder, loss)


def end_costs(
    eagle: EagleConfig,
    parallel: ParallelConfig,
    data_parallel_size: int,
    workload: Workload,
    *,
    mean_tiles: float,
    sum_squared_lengths: float,
    machine: Machine,
    document_bounds: Sequence[Sequence[int]] = (),
) -> tuple[float, float]:
    """What the first pipeline stage does beside its language layers, the vision encoder above all, and what
    the last one does, each in the time of one layer. Arguments as of `step_time`."""
    gpus = parallel.model_parallel_size * data_parallel_size
    packs = mean_tiles, sum_squared_lengths, document_bounds
    shapes = PackShapes(eagle, parallel, workload.sequence_length)
    microbatch = _microbatch_of(shapes, gpus, workload, *packs, machine)

    def seconds(layers: int, *, first: bool = False, last: bool = False) -> float:
        return sum(microbatch(StageShapes((layers,), first, last)).values())

    between = seconds(1)
    layer = seconds(2) - between
    return (seconds(1, first=True) - between) / layer, (seconds(1, last=True) - between) / layer


def _microbatch_of(
    shapes: PackShapes,
    gpus: int,
    workload: Workload,
    mean_tiles: float,
    sum_squared_lengths: float,
    document_bounds: Sequence[Sequence[int]],
    machine: Machine,
) -> Callable[[StageShapes], dict[str, float]]:
    """Seconds of one microbatch by the pipeline stage that computes it."""
    eagle, parallel = shapes.eagle, shapes.parallel
    context = context_work(
        parallel,
        document_bounds or [[0, workload.sequence_length]],
        pair_costs(eagle),
        exchange_costs(eagle, parallel, min(machine.gpus_per_node, gpus)),
    )
    average = replace(workload, tiles=round(mean_tiles))

    @cache  # most stages are alike
    def microbatch(stage: StageShapes) -> dict[str, float]:
        return _microbatch(shapes, average, stage, sum_squared_lengths, context, machine)

    return microbatch


def _microbatch(
    shapes: PackShapes,
    workload: Workload,
    stage: StageShapes,
    sum_squared_lengths: float,
    context: ContextWork,
    machine: Machine,
) -> dict[str, float]:
    """Seconds of forward and backward of one pack on a rank of `stage`."""
    e, ranks = workload.element_size, shapes.tp * shapes.cp
    tiles = shapes.own_tiles(workload.tiles) if stage.first else 0

    def flops(layers: int, trainable: Collection[str]) -> StepFlops:
        return training_flops(
            shapes.eagle,
            tokens=shapes.length,
            sum_squared_lengths=sum_squared_lengths,
            tiles=tiles,
            trainable=trainable,
            adapters=workload.lora is not None and bool(trainable),
            layers=layers,
        )

    step, forward = flops(stage.layers, workload.trainable), flops(stage.layers, ())
    head, head_forward = flops(0, workload.trainable).language_linear, flops(0, ()).language_linear
    linear, attention = step.language_linear, forward.language_attention
    attention_backward = (step.language_attention - attention) * BACKWARD_EXECUTED
    vision = step.vision + step.connector
    if not stage.last:
        linear -= head
    if workload.recompute.language in ("full", "offload"):
        linear += forward.language_linear - head_forward
    elif "mlp" in workload.computed_again:
        mlp = feed_forward_products(shapes.eagle.text) / shapes.h / shapes.tp
        others = 2 * (shapes.q + shapes.kv)
        linear += (forward.language_linear - head_forward) * mlp / (mlp + others)
    if "core_attn" in workload.computed_again:
        attention += forward.language_attention
    if workload.recompute.vision == "full":
        vision += forward.vision

    kept = stage.layers * language_layer(shapes, workload).total
    kept += vision_activations(shapes, workload) if stage.first else 0
    logits = _logits_bytes(shapes, workload) if stage.last else 0
    # A gradient is written, then added to the fp32 buffer.
    accumulation = count_parameters(shapes, stage, workload.lora).trained(workload.trainable) * (
        2 * e + 2 * FP32
    )
    traffic = ACTIVATION_PASSES * kept + logits + accumulation
    stages = shapes.parallel.pipeline_model_parallel_size
    return {
        "matrix_products": linear / ranks / machine.gemm,
        "attention": context.imbalance
        / ranks
        * (attention / machine.attention + attention_backward / machine.attention_backward),
        "vision": vision / shapes.vision_ranks / machine.gemm,
        "elementwise": traffic / machine.memory,
        "tensor_parallel": _tensor_bytes(shapes, workload, stage, tiles) / machine.bandwidth(shapes.tp, 1),
        "context_parallel": _context_seconds(shapes, workload, stage, context, machine),
        "expert_parallel": stage.layers * _expert_seconds(shapes, workload, machine),
        "pipeline": _stage_bytes(shapes, workload) / machine.bandwidth(stages, machine.gpus_per_node),
    }


def _tensor_bytes(shapes: PackShapes, workload: Workload, stage: StageShapes, tiles: int) -> float:
    """Bytes through a rank's link for one pack; an all-reduce is a reduce-scatter and an all-gather."""
    e, s, h, tp, sequence_parallel = (
        workload.element_size,
        shapes.s,
        shapes.h,
        shapes.tp,
        shapes.parallel.sequence_parallel,
    )
    # Two all-reduces each way, one where experts have messages of their own. Sequence parallelism gathers
    # the column-parallel inputs once more.
    halves = stage.layers * (10 if sequence_parallel else 8)
    if shapes.eagle.text.experts is not None:
        halves //= 2
    if stage.last:
        # Gradient of the output layer's input, which the fused loss does not gather again.
        halves += 3 if sequence_parallel and not workload.fused_loss else 2
    moved = halves * s * h * e
    if tiles:
        moved += 2 * s * h * e  # the embedding
        if shapes.vision_ranks > 1:
            vision = shapes.eagle.vision
            moved += 8 * vision.num_hidden_layers * tiles * vision.num_patches * shapes.c * e
            # The connector's output, and the gradient of its input.
            moved += 2 * tiles * shapes.eagle.tokens_per_tile * h * e
            moved += 2 * tiles * vision.num_patches * shapes.c * e
    return moved * (tp - 1) / tp


def _logits_bytes(shapes: PackShapes, workload: Workload) -> int:
    """Memory traffic of one pack's logits on a rank of the last stage.

    Those of the fused loss are written, read for the sums, made a gradient in place and read by two products;
    each chunk's part of the weight's gradient is added in fp32.
    """
    e, s, rows = workload.element_size, shapes.s, shapes.vocabulary
    if not workload.fused_loss:
        return ACTIVATION_PASSES * s * rows * (e + FP32)
    return 6 * s * rows * e + math.ceil(s / CHUNK) * 2 * rows * shapes.h * FP32


def _context_seconds(
    shapes: PackShapes, workload: Workload, stage: StageShapes, context: ContextWork, machine: Machine
) -> float:
    """Keys and values from other ranks forward and again backward, their fp32 gradients back; Ulysses' heads
    both ways; image features."""
    tp, cp, ulysses = shapes.tp, shapes.cp, shapes.ulysses
    e, layers = workload.element_size, stage.layers
    again = "core_attn" in workload.computed_again
    times = 3 if again else 2  # backward, and a second forward, take keys again
    kv = shapes.attention_kv_heads * shapes.eagle.text.head_dim
    keys = layers * context.remote_keys * 2 * kv * (times * e + FP32)
    seconds = keys / machine.bandwidth(cp // ulysses, tp * ulysses)
    # A second run of attention trades heads again, one of the layer around it too.
    ways = 3 if again or workload.recompute.language == "offload" else 2
    heads = shapes.s * 2 * (shapes.q + kv * ulysses) * e
    seconds += layers * ways * machine.exchange_seconds(heads, ulysses, tp)
    if stage.first and shapes.parallel.vision_sharding != "none":
        features = workload.tiles * shapes.eagle.tokens_per_tile * shapes.h * e
        seconds += 2 * machine.exchange_seconds(features / cp, cp, tp)
    return seconds


def _expert_seconds(shapes: PackShapes, workload: Workload, machine: Machine) -> float:
    """All-to-alls of a layer over the ranks that have other experts, there and back, each way; with divided
    experts also the gathering of what the ranks with their other parts got, and the sum of their results.

    Tokens are taken as evenly spread.
    """
    if shapes.eagle.text.experts is None:
        return 0.0
    experts, parts = shapes.parallel.expert_model_parallel_size, shapes.parallel.expert_tensor_size
    row = shapes.h * workload.element_size
    times = 6 if "mlp" in workload.computed_again else 4
    got = shapes.routed_rows * row
    seconds = times * machine.exchange_seconds(got / parts, experts, parts)
    return seconds + times * got * (parts - 1) / parts / machine.bandwidth(parts, 1)


def _stage_bytes(shapes: PackShapes, workload: Workload) -> float:
    """Hidden states to the next stage and their gradient back, once per chunk."""
    if shapes.parallel.pipeline_model_parallel_size == 1:
        return 0.0
    return 2 * shapes.parallel.num_model_chunks * shapes.r * shapes.h * workload.element_size


def _finish(
    shapes: PackShapes, data_parallel_size: int, workload: Workload, machine: Machine
) -> tuple[float, float]:
    """Seconds of the gradients' reduction with the weights' gathering, and of Adam, on the fullest stage."""
    tp, e, parallel = shapes.tp, workload.element_size, shapes.parallel
    stages = range(parallel.pipeline_model_parallel_size)
    counts = [count_parameters(shapes, StageShapes.of(shapes, stage), workload.lora) for stage in stages]
    largest = max(count.trained(workload.trainable) for count in counts)
    ranks = data_parallel_size * shapes.cp
    experts = max(count.trained_experts(workload.trainable) for count in counts)
    copies, stride = parallel.expert_data_ranks(ranks), tp * ranks // parallel.expert_data_ranks(ranks)
    seconds = (largest - experts) * (FP32 + e) * (ranks - 1) / ranks / machine.bandwidth(ranks, tp)
    seconds += experts * (FP32 + e) * (copies - 1) / copies / machine.bandwidth(copies, stride)
    if parallel.vision_sharding == "cp_tp":
        vision = counts[0].vision_and_connector(workload.trainable)
        seconds += 2 * vision * FP32 * (tp - 1) / tp / machine.bandwidth(tp, 1)
    # Read: gradient, weight, two moments. Written: weight, two moments, and the rounded weight.
    adam = ((largest - experts) / ranks + experts / copies) * (7 * FP32 + e) / machine.memory
    return seconds, adam

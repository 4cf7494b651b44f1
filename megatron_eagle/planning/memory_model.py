"""What each GPU holds at the fullest moment of a training step.

A step's memory rises while forwards keep activations and falls while backwards free them, so its peak is
one of a few moments: the loss, the first backward of a layer, the optimizer step. Each is counted from
shapes (`memory_shapes`) and from the order in which the code makes and frees its temporary tensors;
nothing is fitted to a measurement. `tests/planning/test_memory_model.py` compares with real runs.
"""

from dataclasses import dataclass

from eagle_kernels.linear_cross_entropy import CHUNK
from megatron_eagle.context_parallel.planning import plan_layout
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.specs import vision_parallel_size
from megatron_eagle.planning.memory_shapes import (
    FP32,
    Workload,
    count_parameters,
    kv_size,
    language_layer,
    query_size,
    rank_rows,
    rms_norm_bytes,
    stage_layers,
    vision_activations,
    vision_layer,
    vision_tiles,
)
from megatron_eagle.runtime.parallel import ParallelConfig


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a rank of one pipeline stage holds at its fullest moment, by part."""

    stage: int
    moment: str
    weights: int
    gradients: int  # fp32 buffer, whole on every data parallel rank
    optimizer: int  # Adam's moments and, of a bf16 model, fp32 main parameters: shared over data x context
    host: int = 0  # tensors of offloaded layers, counted where that is the same memory
    activations: int = 0  # of the language layers, all microbatches in flight
    vision: int = 0  # activations of encoder and connector, all microbatches in flight; tiles
    logits: int = 0  # logits (of the fused loss: of a chunk) and gradients of the output layer
    workspace: int = 0  # transient: attention with its gathered keys and values, gradients of one layer, Adam

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: value for name, value in vars(self).items() if name not in ("stage", "moment")}

    @property
    def states(self) -> int:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer + self.host

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def fullest_stage(
    eagle: EagleConfig, parallel: ParallelConfig, data_parallel_size: int, workload: Workload
) -> StageMemory:
    """The memory of the pipeline stage that needs most.

    Stages between the second and the last hold fewer microbatches than the second and nothing else.
    """
    last = parallel.pipeline_model_parallel_size - 1
    stages = sorted({0, min(1, last), last})
    found = [peak_memory(eagle, parallel, data_parallel_size, workload, stage) for stage in stages]
    return max(found, key=lambda memory: memory.total)


def peak_memory(
    eagle: EagleConfig, parallel: ParallelConfig, data_parallel_size: int, workload: Workload, stage: int
) -> StageMemory:
    """The fullest moment of a step on a rank of pipeline stage `stage`."""
    return max(
        memory_moments(eagle, parallel, data_parallel_size, workload, stage), key=lambda memory: memory.total
    )


def memory_moments(
    eagle: EagleConfig, parallel: ParallelConfig, data_parallel_size: int, workload: Workload, stage: int
) -> list[StageMemory]:
    """The moments of a step at which a rank of pipeline stage `stage` may hold most."""
    e, tp = workload.element_size, parallel.tensor_model_parallel_size
    parameters = count_parameters(eagle, parallel, stage)
    trained = parameters.trained(workload.trainable)
    shard = -(-trained // (data_parallel_size * parallel.context_parallel_size))
    states = {
        "stage": stage,
        "weights": parameters.total * e,
        "gradients": trained * FP32,
        "optimizer": shard * (2 if e == FP32 else 3) * FP32,
        "host": offloaded_bytes(eagle, parallel, workload, stage) if workload.device == "cpu" else 0,
    }
    buffer, host = _gather_buffer(eagle, parallel, workload), _host_pixels(eagle, workload, stage)
    moments = [
        StageMemory(
            **states,
            moment=moment.name,
            activations=moment.activations,
            vision=moment.vision + host,
            logits=moment.logits,
            workspace=moment.workspace + buffer,
        )
        for moment in _backward_moments(eagle, parallel, workload, stage)
    ]
    after = {"optimizer step": _adam(workload, min(parameters.largest, shard), shard)}
    if workload.device == "cpu":
        after["sum of gradients"] = trained * FP32  # gloo's reduce-scatter copies the buffer
    if parallel.vision_sharding == "cp_tp" and tp > 1:
        after["sum of the encoder's gradients"] = parameters.vision_and_connector(workload.trainable) * FP32
    for name, workspace in after.items():
        moments.append(StageMemory(**states, moment=name, vision=host, workspace=workspace + buffer))
    return moments


def offloaded_bytes(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload, stage: int) -> int:
    """Bytes of host memory that the offloaded layers of a rank take."""
    if workload.recompute.language != "offload":
        return 0
    layers = stage_layers(eagle, parallel, stage) // parallel.num_model_chunks
    layers = max(layers - workload.recompute.offload_keep_last, 0)
    return layers * parallel.forwards_in_flight(stage) * language_layer(eagle, parallel, workload).offloaded


@dataclass(frozen=True)
class _Moment:
    name: str
    activations: int
    vision: int
    workspace: int = 0
    logits: int = 0


def _backward_moments(
    eagle: EagleConfig, parallel: ParallelConfig, workload: Workload, stage: int
) -> list[_Moment]:
    """The moments at which the backward of a microbatch may hold most, for every chunk of the stage."""
    e, chunks = workload.element_size, parallel.num_model_chunks
    first, last = stage == 0, stage == parallel.pipeline_model_parallel_size - 1
    r, h = rank_rows(parallel, workload), eagle.text.hidden_size
    policy, layer = workload.recompute.language, language_layer(eagle, parallel, workload)
    in_chunk = staying = stage_layers(eagle, parallel, stage) // chunks
    if policy == "offload":
        staying = min(workload.recompute.offload_keep_last, in_chunk)
    layers = staying * layer.kept(policy)
    vision = vision_activations(eagle, parallel, workload) if first else 0
    final_norm = rms_norm_bytes(r, h, e)

    kept = []
    for chunk in range(chunks):
        begins, ends = first and chunk == 0, last and chunk == chunks - 1
        language = layers + (final_norm if ends else 0)
        if not begins and (staying < in_chunk or (e < FP32 and policy in ("none", "selective"))):
            # What arrived from the stage before; the first norm keeps an fp32 copy, an offloaded layer none.
            language += r * h * e
        if not ends and workload.device == "cpu":
            language += r * h * e  # what was sent on; freed at once on a GPU
        kept.append((language, vision if begins else 0))

    # A layer that kept its input alone is whole again during its backward; in fp32 its norm keeps that input.
    restored = layer.total - (layer.input if e == FP32 else 0) if policy in ("full", "offload") else 0
    if policy == "offload":
        restored -= layer.output + layer.statistics  # kept, not made again
        # The layer under way and the one before it have come back.
        restored += max(0, min(2, in_chunk) - staying) * layer.offloaded
    moments = []
    for chunk, (language, encoder) in enumerate(in_flight(parallel, workload.microbatches, stage, kept)):
        if last and chunk == chunks - 1:
            loss = _fused_loss if workload.fused_loss else _loss
            moments.append(_Moment("loss", language, encoder, logits=loss(eagle, parallel, workload)))
            language -= final_norm
        feed_forward = restored + _feed_forward(eagle, parallel, workload)
        attention = restored - layer.mlp + _attention(eagle, parallel, workload)
        moments.append(_Moment("feed-forward backward", language, encoder, feed_forward))
        moments.append(_Moment("attention backward", language, encoder, attention))
        if first and chunk == 0 and vision:
            rest, scratch = language - layers, _vision_layer(eagle, parallel, workload)
            moments.append(_Moment("encoder backward", rest, encoder, scratch))
    return moments


def _gather_buffer(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """Megatron's buffer of tokens gathered under sequence parallelism, one for all layers."""
    if not parallel.sequence_parallel:
        return 0
    tokens = workload.sequence_length // parallel.context_parallel_size
    return tokens * eagle.text.hidden_size * workload.element_size


def _host_pixels(eagle: EagleConfig, workload: Workload, stage: int) -> int:
    """On the CPU, the packs of the step before they are cut."""
    if stage > 0 or workload.device != "cpu":
        return 0
    tile = eagle.vision.num_channels * eagle.vision.image_size**2 * FP32
    return workload.microbatches * workload.tiles * tile


def _loss(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """Whole logits. In fp32 they become the softmax and then their own gradient in place (a bf16 model has
    both); autograd copies the gradient for the write into the padding rows. Later the gradient of the logits
    shares memory with that of the output layer's weight and input."""
    e, h = workload.element_size, eagle.text.hidden_size
    s = workload.sequence_length // parallel.context_parallel_size
    rows = eagle.text.padded_vocab_size // parallel.tensor_model_parallel_size
    softmax = s * rows * (FP32 + e)
    return max(softmax, s * rows * e + rows * h * e + s * h * e)


def _fused_loss(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """`eagle_kernels.linear_cross_entropy`. Forward: gradients of input and weight, the latter in fp32, and
    the logits of a chunk, over several ranks of two; eager, in fp32 and in bf16 first in that. Backward: the
    gradient of the input twice, for it is put in the places of the supervised tokens, and that of the weight
    once more in its own type."""
    e, h, tp = workload.element_size, eagle.text.hidden_size, parallel.tensor_model_parallel_size
    s = workload.sequence_length // parallel.context_parallel_size
    rows, chunk = eagle.text.padded_vocab_size // tp, min(CHUNK, s)
    weight = 0 if workload.loss_into_main_grad else rows * h * FP32
    own_type = rows * h * e if e < FP32 or workload.loss_into_main_grad else 0
    work = FP32 if workload.device == "cpu" else e  # bytes of an element between a chunk's two halves
    logits = chunk * rows * (work + (e if workload.device == "cpu" and e < FP32 else 0))
    if tp > 1:
        logits += min(chunk, s - chunk) * rows * work
    gathered = s * h * e if parallel.sequence_parallel else 0
    forward = s * h * e + weight + logits + chunk * h * e + gathered
    return max(forward, 2 * s * h * e + weight + own_type)


def _feed_forward(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """Gradients of the second linear layer's input, weight and output, and of the residual."""
    e, h = workload.element_size, eagle.text.hidden_size
    s, r = workload.sequence_length // parallel.context_parallel_size, rank_rows(parallel, workload)
    f = eagle.text.intermediate_size // parallel.tensor_model_parallel_size
    product = s * f if workload.recompute.swiglu else 0  # computed again
    return e * (s * f + h * f + s * h + r * h + product)


def _attention(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """Backward of core attention, while the residual's gradient waits.

    Gradients of q and of the output, and either the score matrices with the fp32 gradients of keys and
    values, or those gradients stacked. With context parallelism that is so for one key-value head at a time,
    with its gathered keys and values and those of the next head, fp32 gradients of the local ones, and the
    head's gradients of gathered ones once more stacked and twice in the order of ranks while they are added.
    """
    tp, cp, e = parallel.tensor_model_parallel_size, parallel.context_parallel_size, workload.element_size
    keys = 2 * workload.sequence_length * kv_size(eagle) // tp
    s, q = workload.sequence_length // cp, query_size(eagle) // tp
    held = 2 * s * q * e + rank_rows(parallel, workload) * eagle.text.hidden_size * e
    scores = _score_matrices(eagle, parallel, workload) if workload.device == "cpu" else 0
    if cp == parallel.ulysses_parallel_size:
        keys //= cp
        return held + keys * FP32 + max(scores, keys * FP32)
    heads = eagle.text.num_key_value_heads // tp // parallel.ulysses_parallel_size
    group = keys // (eagle.text.num_key_value_heads // tp)
    return held + 2 * group * e + keys // cp * FP32 + group * FP32 + max(scores // heads, 3 * group * FP32)


def _score_matrices(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """The reference attention's backward, segment after segment: four fp32 matrices [heads, queries, keys]
    at once (weights, their gradient, two steps of the scores' gradient) and one to three of the segment
    before, whose names are assigned one after the other."""
    ulysses = parallel.ulysses_parallel_size
    heads = eagle.text.num_attention_heads // parallel.tensor_model_parallel_size // ulysses
    length, longest = workload.sequence_length, workload.longest_document or workload.sequence_length
    bounds = [*range(0, length, longest), length]
    ranks = parallel.context_parallel_size // ulysses
    name, chunk_size = parallel.context_parallel_layout, parallel.context_parallel_chunk_size
    layout = plan_layout(name, length, ranks, bounds, chunk_size)
    worst = 0
    for rank in range(layout.size):
        before = 0
        for part in layout.segments(rank, bounds):
            size = heads * (part.q_end - part.q_start) * (part.k_end - part.k_start) * FP32
            worst = max(worst, 3 * before + 2 * size, before + 4 * size)
            before = size
    return worst


def _vision_layer(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload) -> int:
    """Backward of the encoder's last feed-forward: as `_feed_forward`, the layer restored if not kept."""
    vision, e = eagle.vision, workload.element_size
    layer = vision_layer(eagle, parallel, workload)
    restored = layer.total - layer.input if workload.recompute.vision == "full" else 0
    p, c = vision_tiles(parallel, workload.tiles) * vision.num_patches, vision.hidden_size
    i = vision.intermediate_size // vision_parallel_size(parallel)
    return restored + e * (p * i + c * i + 2 * p * c)


def _adam(workload: Workload, largest: int, shard: int) -> int:
    """torch's Adam: square roots of the second moments, of all tensors at once on a GPU (`foreach`), with
    their quotient one tensor at a time on the CPU."""
    return shard * FP32 if workload.device == "cuda" else 2 * largest * FP32


def in_flight(
    parallel: ParallelConfig, microbatches: int, stage: int, per_chunk: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Largest (language, vision) bytes held when a backward of each chunk begins: walks Megatron's schedule.

    One forward, one backward after a warm-up; with virtual stages, chunks take turns every `stages`
    microbatches, and the backward goes through them in reverse.
    """
    stages, chunks = parallel.pipeline_model_parallel_size, len(per_chunk)
    # The pattern repeats: four rounds show it all.
    microbatches = min(microbatches, 4 * stages)
    units = [
        chunk
        for start in range(0, microbatches, stages)
        for chunk in range(chunks)
        for _ in range(min(stages, microbatches - start))
    ]
    warmup = min(parallel.forwards_in_flight(stage) - 1, len(units))
    language = vision = 0
    worst = [(0, 0)] * chunks
    for step in range(len(units) + warmup):
        if step < len(units):
            language += per_chunk[units[step]][0]
            vision += per_chunk[units[step]][1]
        if step >= warmup:
            chunk = chunks - 1 - units[step - warmup]
            worst[chunk] = max(worst[chunk], (language, vision), key=sum)
            language -= per_chunk[chunk][0]
            vision -= per_chunk[chunk][1]
    return worst

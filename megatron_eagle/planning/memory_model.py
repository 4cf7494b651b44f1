"""What each GPU holds at the fullest moment of a training step.

A step's memory rises while forwards keep activations and falls while backwards free them, so its peak is
one of a few moments: the loss, the first backward of a layer, the optimizer step. Each is counted from
shapes (`memory_shapes`) and from the order in which the code makes and frees its temporary tensors;
nothing is fitted to a measurement. `tests/planning/test_memory_model.py` compares with real runs.
"""

from dataclasses import dataclass

from eagle_kernels.linear_cross_entropy import CHUNK
from megatron_eagle.model.parts import NEW_TOKEN_ROWS
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import PackShapes, StageShapes
from megatron_eagle.planning.attention_memory import attention_backward, flash_workspace
from megatron_eagle.planning.memory_shapes import (
    FP32,
    LayerActivations,
    Workload,
    count_parameters,
    language_layer,
    rms_norm_bytes,
    vision_activations,
    vision_layer,
)
from megatron_eagle.runtime.parallel import ParallelConfig


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a rank of one pipeline stage holds at its fullest moment, by part."""

    stage: int
    moment: str
    weights: int
    gradients: int  # buffer, of `grad_reduce_in_fp32`'s type, whole on every data parallel rank
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

    Of stages between the first and the last with equal chunks the earliest holds most microbatches.
    """
    last, chunks = (
        parallel.pipeline_model_parallel_size - 1,
        parallel.stage_layers(eagle.text.num_hidden_layers),
    )
    earliest = {tuple(chunks[stage]): stage for stage in range(last - 1, 0, -1)}
    stages = sorted({0, *earliest.values(), last})
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
    e, shapes = workload.element_size, PackShapes(eagle, parallel, workload.sequence_length)
    parameters = count_parameters(shapes, StageShapes.of(shapes, stage), workload.lora)
    trained = parameters.trained(workload.trainable)
    experts = parameters.trained_experts(workload.trainable)
    replicas = data_parallel_size * shapes.cp
    shard = -(-(trained - experts) // replicas) + -(-experts // parallel.expert_data_ranks(replicas))
    gradient = FP32 if parallel.grad_reduce_in_fp32 else e
    states = {
        "stage": stage,
        "weights": parameters.total * e,
        "gradients": trained * gradient,
        "optimizer": shard * (2 if e == FP32 else 3) * FP32,
        "host": offloaded_bytes(eagle, parallel, workload, stage) if workload.device == "cpu" else 0,
    }
    buffer, host = _gather_buffer(shapes, workload), _host_pixels(eagle, workload, stage)
    moments = [
        StageMemory(
            **states,
            moment=moment.name,
            activations=moment.activations,
            vision=moment.vision + host,
            logits=moment.logits,
            workspace=moment.workspace + buffer,
        )
        for moment in _backward_moments(shapes, workload, stage)
    ]
    # Of gradients in another type the optimizer makes its own.
    own = shard * FP32 if gradient < FP32 else 0
    after = {"optimizer step": own + _adam(workload, min(parameters.largest, shard), shard)}
    if workload.device == "cpu":
        after["sum of gradients"] = trained * gradient  # gloo's reduce-scatter copies the buffer
    if parallel.vision_sharding == "cp_tp" and shapes.tp > 1:
        # Those of the shard, of the rank whose shard is the encoder's: joined for one message.
        encoder = parameters.vision_and_connector(workload.trainable)
        after["sum of the encoder's gradients"] = min(encoder, shard) * gradient
    for name, workspace in after.items():
        moments.append(StageMemory(**states, moment=name, vision=host, workspace=workspace + buffer))
    return moments


def offloaded_bytes(eagle: EagleConfig, parallel: ParallelConfig, workload: Workload, stage: int) -> int:
    """Bytes of host memory that the offloaded layers of a rank take."""
    if workload.recompute.language != "offload":
        return 0
    shapes = PackShapes(eagle, parallel, workload.sequence_length)
    layers = max(StageShapes.of(shapes, stage).chunk_layers - workload.recompute.offload_keep_last, 0)
    return layers * parallel.forwards_in_flight(stage) * language_layer(shapes, workload).offloaded


@dataclass(frozen=True)
class _Moment:
    name: str
    activations: int
    vision: int
    workspace: int = 0
    logits: int = 0


@dataclass(frozen=True)
class _Chunk:
    """Bytes that the forward of a microbatch leaves on the device in one chunk of a stage."""

    layers: int
    final_norm: int  # of the chunk that ends with the loss
    passed: int  # hidden states that arrived from the stage before, and that were sent on
    vision: int  # of the chunk that begins with the embedding

    @property
    def language(self) -> int:
        return self.layers + self.final_norm + self.passed


def _chunks(shapes: PackShapes, workload: Workload, stage: StageShapes) -> list[_Chunk]:
    """What a forward leaves in each chunk of a stage."""
    e, policy = workload.element_size, workload.recompute.language
    layer, hidden = language_layer(shapes, workload), shapes.r * shapes.h * e
    vision = vision_activations(shapes, workload) if stage.first else 0
    # An eager first norm keeps an fp32 copy of what arrived, an offloaded layer none.
    copied = not workload.fused_kernels and e < FP32 and policy in ("none", "selective")
    found = []
    for chunk, size in enumerate(stage.chunk_sizes):
        staying = _staying(workload, size)
        arrived = staying < size or copied
        begins = stage.first and chunk == 0
        ends = stage.last and chunk == len(stage.chunk_sizes) - 1
        passed = hidden if arrived and not begins else 0
        if not ends and workload.device == "cpu":
            passed += hidden  # what was sent on is freed at once on a GPU
        final_norm = _final_norm(shapes, workload) if ends else 0
        layers = staying * layer.kept(policy, workload.computed_again)
        found.append(_Chunk(layers, final_norm, passed, vision if begins else 0))
    return found


def _staying(workload: Workload, layers: int) -> int:
    """Of a chunk's `layers`, those whose activations stay on the device."""
    if workload.recompute.language != "offload":
        return layers
    return min(workload.recompute.offload_keep_last, layers)


def _final_norm(shapes: PackShapes, workload: Workload) -> int:
    """The norm before the output layer. What that reads is gathered, and no more kept, by the loss."""
    return rms_norm_bytes(shapes.r, shapes.h, workload)


def _restored(layer: LayerActivations, workload: Workload, stage: StageShapes) -> int:
    """What comes back for a layer's backward. One that kept its input alone is whole again, whose norm in
    fp32 keeps that input."""
    policy = workload.recompute.language
    if policy == "selective" and "mlp" in workload.computed_again:
        return layer.feed_forward
    if policy not in ("full", "offload"):
        return 0
    keeps_input = workload.element_size == FP32 or workload.fused_kernels
    whole = layer.total - (layer.input if keeps_input else 0)
    if policy == "full":
        return whole
    # Output and statistics are kept, not made again; the layer under way and the one before it are back.
    back = max(0, min(2, stage.chunk_layers) - _staying(workload, stage.chunk_layers)) * layer.offloaded
    return whole - layer.output - layer.statistics + back


def _backward_moments(shapes: PackShapes, workload: Workload, number: int) -> list[_Moment]:
    """The moments at which the backward of a microbatch may hold most, for every chunk of stage `number`."""
    stage, layer = StageShapes.of(shapes, number), language_layer(shapes, workload)
    restored = _restored(layer, workload, stage)
    feed_forward = restored + _feed_forward(shapes, workload)
    attention = restored - layer.mlp + attention_backward(shapes, workload)
    chunks, moments = _chunks(shapes, workload, stage), []
    per_chunk = [(chunk.language, chunk.vision) for chunk in chunks]
    held = in_flight(shapes.parallel, workload.microbatches, number, per_chunk)
    for chunk, (language, encoder) in zip(chunks, held, strict=True):
        if chunk.final_norm:
            loss = (_fused_loss if workload.fused_loss else _loss)(shapes, workload)
            moments.append(_Moment("loss", language, encoder, logits=loss))
            language -= chunk.final_norm
        moments.append(_Moment("feed-forward backward", language, encoder, feed_forward))
        moments.append(_Moment("attention backward", language, encoder, attention))
        if workload.lora is not None:
            adapters = restored - layer.mlp + _adapted_feed_forward(shapes, workload)
            moments.append(_Moment("adapters", language, encoder, adapters))
        if chunk.vision:
            scratch = _vision_layer(shapes, workload)
            moments.append(_Moment("encoder backward", language - chunk.layers, encoder, scratch))
    if stage.first and "vision" not in workload.trainable:
        others = max(language for language, _ in held) - chunks[0].language
        encoder = held[0][1] - chunks[0].vision
        moments.append(_Moment("encoder forward", others, encoder, _frozen_encoder(shapes, workload)))
    return moments


def _gather_buffer(shapes: PackShapes, workload: Workload) -> int:
    """Megatron's buffer of tokens gathered under sequence parallelism, one for all layers."""
    if not shapes.parallel.sequence_parallel:
        return 0
    return shapes.s * shapes.h * workload.element_size


def _host_pixels(eagle: EagleConfig, workload: Workload, stage: int) -> int:
    """On the CPU, the packs of the step before they are cut."""
    if stage > 0 or workload.device != "cpu":
        return 0
    tile = eagle.vision.num_channels * eagle.vision.image_size**2 * FP32
    return workload.microbatches * workload.tiles * tile


def _loss(shapes: PackShapes, workload: Workload) -> int:
    """Whole logits. In fp32 they become the softmax and then their own gradient in place (a bf16 model has
    both); autograd copies the gradient for the write into the padding rows. Later the gradient of the logits
    shares memory with that of the output layer's weight and input."""
    e, s, h, rows = workload.element_size, shapes.s, shapes.h, shapes.vocabulary
    softmax = s * rows * (FP32 + e)
    return max(softmax, s * rows * e + rows * h * e + s * h * e)


def _fused_loss(shapes: PackShapes, workload: Workload) -> int:
    """`eagle_kernels.linear_cross_entropy`. Forward: gradients of input and weight, the latter in fp32, and
    the logits of a chunk, over several ranks of two; eager, in fp32 and in bf16 first in that. Backward: the
    gradient of the input twice, for it is put in the places of the supervised tokens, and that of the weight
    once more in its own type."""
    e, s, h, rows = workload.element_size, shapes.s, shapes.h, shapes.vocabulary
    chunk = min(CHUNK, s)
    trained = (
        "language" in workload.trainable and workload.lora is None or NEW_TOKEN_ROWS in workload.trainable
    )
    weight = rows * h * FP32 if trained and not workload.loss_into_main_grad else 0
    own_type = rows * h * e if trained and (e < FP32 or workload.loss_into_main_grad) else 0
    work = FP32 if workload.device == "cpu" else e  # bytes of an element between a chunk's two halves
    logits = chunk * rows * (work + (e if workload.device == "cpu" and e < FP32 else 0))
    if shapes.tp > 1:
        logits += min(chunk, s - chunk) * rows * work
    gathered = s * h * e if shapes.parallel.sequence_parallel else 0
    forward = s * h * e + weight + logits + chunk * h * e + gathered
    return max(forward, 2 * s * h * e + weight + own_type)


def _feed_forward(shapes: PackShapes, workload: Workload) -> int:
    """Gradients of the second linear layer's input, weight and output, and of the residual."""
    s, r, h, f = shapes.s, shapes.r, shapes.h, shapes.f
    if shapes.eagle.text.experts is not None:
        # Of all of a rank's experts together: of the weighted product and the product, of gate and up, and of
        # the rows, which are put in order for the way back.
        rows = shapes.routed_rows
        return workload.element_size * (rows * (4 * f + 2 * h) + 3 * h * f + r * h)
    product = s * f if workload.recompute.swiglu else 0  # computed again
    return workload.element_size * (s * f + h * f + s * h + r * h + product)


def _adapted_feed_forward(shapes: PackShapes, workload: Workload) -> int:
    """Forward of the first linear layer of an MLP and its adapters: their features of gate and up are made
    one by one, joined, and added to the layer's own. Under recomputation the output's gradient waits."""
    norm = rms_norm_bytes(shapes.r, shapes.h, workload)
    return norm + workload.element_size * (3 * shapes.s * 2 * shapes.f + shapes.r * shapes.h)


def _vision_layer(shapes: PackShapes, workload: Workload) -> int:
    """Backward of the encoder's last layer, restored if not kept: its feed-forward, as `_feed_forward`, or
    on a GPU its attention, with the gradients of the output and of q, k and v and the kernel's workspace."""
    layer, c, i, e = vision_layer(shapes, workload), shapes.c, shapes.i, workload.element_size
    restored = layer.total - layer.input if workload.recompute.vision == "full" else 0
    tiles, vision = shapes.own_tiles(workload.tiles), shapes.eagle.vision
    p = tiles * vision.num_patches
    feed_forward = restored + e * (p * i + c * i + 2 * p * c)
    if workload.device == "cpu":
        return feed_forward
    heads = vision.num_attention_heads // shapes.vision_ranks
    kernel = flash_workspace(
        tokens=p, segments=tiles, heads=heads, kv_heads=heads, keys=p,
        head=-(-c // vision.num_attention_heads // 8) * 8, workload=workload,
    )  # fmt: skip
    gradients = e * (p * c + 4 * p * c // shapes.vision_ranks)
    return max(feed_forward, restored - layer.mlp + gradients + kernel)


def _frozen_encoder(shapes: PackShapes, workload: Workload) -> int:
    """Forward of an encoder that keeps nothing, beside the tokens' embeddings: pixels in fp32, patches as
    they come out of the convolution, with positions, and contiguous. In a layer its input, the sum after
    attention and the second norm, and either what is before and after the GELU, or the MLP's output, that
    with its bias, and the sum."""
    e, vision, c, i = workload.element_size, shapes.eagle.vision, shapes.c, shapes.i
    tiles = shapes.own_tiles(workload.tiles)
    patches = tiles * vision.num_patches * e
    pixels = tiles * vision.num_channels * vision.image_size**2 * FP32
    return shapes.r * shapes.h * e + pixels + patches * (6 * c + max(3 * c, 2 * i))


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

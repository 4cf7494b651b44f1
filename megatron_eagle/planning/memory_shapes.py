"""What a rank keeps: its parameters, and the activations that each layer keeps for its backward, in bytes.

Counted from shapes; nothing is fitted to a measurement. Each line names the tensors that the layer's code
keeps; `tests/planning/test_memory_model.py` compares the counts with what autograd really saves.

Letters: those of `model.shapes`, and e bytes of an element.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from megatron_eagle.model.flops import PARTS
from megatron_eagle.model.parts import NEW_TOKEN_ROWS
from megatron_eagle.model.shapes import LocalShapes, PackShapes, StageShapes
from megatron_eagle.model.specs import RecomputeConfig

FP32 = 4


@dataclass(frozen=True)
class Workload:
    """What every data parallel rank computes in one step."""

    sequence_length: int  # tokens of a pack
    tiles: int  # of a pack
    microbatches: int  # packs of a data parallel rank and step
    precision: Literal["bf16", "fp32"] = "bf16"
    longest_document: int | None = None  # tokens; None: a pack is one document
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    # As `optimizer.trainable`. With a frozen language model its activations are an upper bound: weights
    # without a gradient do not keep their inputs.
    trainable: Collection[str] = PARTS
    # Of `layers`: the fused loss, and whether it adds its weight's gradient to the fp32 buffer at once. All
    # tokens are taken as supervised.
    fused_loss: bool = False
    loss_into_main_grad: bool = False
    # "cpu" counts the reference attention's score matrices and the packs of the step; "cuda" a fused
    # attention kernel, whose memory is linear in the sequence.
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def element_size(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.precision == "bf16" else FP32


@dataclass(frozen=True)
class Parameters:
    """Elements of the parameters that a rank holds, by part (0 where the stage does not have it)."""

    language: int
    token_rows: int  # of them in the embedding and the output layer
    vision: int
    connector: int
    largest: int  # of one tensor

    @property
    def total(self) -> int:
        return self.language + self.vision + self.connector

    def trained(self, trainable: Collection[str]) -> int:
        """Elements with a gradient buffer."""
        rows = self.token_rows if NEW_TOKEN_ROWS in trainable else 0
        parts = {"vision": self.vision, "connector": self.connector, "language": self.language}
        return rows + sum(size for part, size in parts.items() if part in trainable)

    def vision_and_connector(self, trainable: Collection[str]) -> int:
        """Elements of encoder and connector with a gradient buffer."""
        return self.trained([part for part in trainable if part in ("vision", "connector")])


def count_parameters(shapes: LocalShapes, stage: StageShapes) -> Parameters:
    """Parameters of a rank of a pipeline stage."""
    eagle, vision, h = shapes.eagle, shapes.eagle.vision, shapes.h
    qkv, fc1 = shapes.q + 2 * shapes.kv, 2 * h * shapes.f
    layer = h * qkv + qkv + shapes.q * h + fc1 + fc1 // 2 + 2 * h
    vocabulary = shapes.vocabulary * h
    # Tied embeddings are one tensor only where one stage has both ends.
    ends = 1 if stage.first and stage.last and eagle.text.tie_word_embeddings else stage.first + stage.last
    language = stage.layers * layer + ends * vocabulary + (h if stage.last else 0)
    largest = max(fc1, vocabulary if ends else 0)
    if not stage.first:
        return Parameters(language, ends * vocabulary, 0, 0, largest)
    t, c, i = shapes.vision_ranks, shapes.c, vision.intermediate_size
    patch = vision.num_channels * vision.patch_size**2 * c + c
    block = (3 * c * c + 3 * c + c * c + c * i + i + i * c) // t + 2 * c + 4 * c
    encoder = patch + vision.num_patches * c + vision.num_hidden_layers * block + 2 * c
    shuffled = c * eagle.shuffle_factor**2
    connector = 2 * shuffled + (shuffled * h + h + h * h) // t + h
    return Parameters(language, ends * vocabulary, encoder, connector, largest)


def rms_norm_bytes(r: int, h: int, e: int) -> int:
    """RMSNorm in plain torch: fp32 input (itself in fp32), 1 / deviation, rounded and scaled output."""
    return r * (h * (FP32 + 2 * e) + FP32)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that a layer keeps for its backward."""

    attention: int  # input norm, projections and core attention
    mlp: int  # second norm and feed-forward
    input: int  # the layer's input, which full recomputation keeps alone
    output: int  # of core attention, which offload keeps beside the input and the statistics
    statistics: int  # log-sum-exp of the softmax

    @property
    def total(self) -> int:
        return self.attention + self.mlp

    @property
    def offloaded(self) -> int:
        """Bytes that an offloaded layer moves to host memory."""
        return self.input + self.output + self.statistics

    def kept(self, recompute: Literal["none", "selective", "full", "offload"]) -> int:
        """Bytes that wait on the device for the layer's backward; under `offload`, if it stays there.

        Core attention keeps q, k, v and its output, and the projections around it keep them anyway:
        recomputing it saves the statistics alone.
        """
        if recompute == "full":
            return self.input
        if recompute == "offload":
            return self.offloaded
        return self.total - (self.statistics if recompute == "selective" else 0)


def language_layer(shapes: PackShapes, workload: Workload) -> LayerActivations:
    """What one language layer keeps for one microbatch."""
    e, s, r, h, f = workload.element_size, shapes.s, shapes.r, shapes.h, shapes.f
    q, kv = shapes.q, shapes.kv
    norm = rms_norm_bytes(r, h, e)
    statistics = s * shapes.heads * FP32
    # The joint projection (whose slice is v), rotated q and k, the output. (All layers share one table of
    # cosines and sines.)
    attention = s * e * ((q + 2 * kv) + q + kv + q) + statistics
    # Gate and up, silu(gate) where the kernel is the eager one, their product.
    product = 0 if workload.recompute.swiglu else f
    mlp = s * e * (2 * f + (f if workload.device == "cpu" else 0) + product)
    return LayerActivations(norm + attention, norm + mlp, r * h * e, s * e * q, statistics)


def vision_layer(shapes: PackShapes, workload: Workload) -> LayerActivations:
    """What one layer of the vision encoder keeps for one microbatch."""
    vision, e, t = shapes.eagle.vision, workload.element_size, shapes.vision_ranks
    p, c, i = shapes.own_tiles(workload.tiles) * vision.num_patches, shapes.c, shapes.i
    norm = p * (2 * c * e + 2 * _layer_norm_statistic(workload))  # input and output
    statistics = p * vision.num_attention_heads // t * FP32
    attention = p * e * (3 * c // t + c // t) + statistics  # joint projection, output
    mlp = p * e * 2 * i  # before and after the GELU
    return LayerActivations(norm + attention, norm + mlp, p * c * e, p * e * c // t, statistics)


def vision_activations(shapes: PackShapes, workload: Workload) -> int:
    """Bytes that encoder and connector keep for one microbatch, its tiles included.

    What is frozen, with everything before it frozen too, keeps nothing.
    """
    if "vision" not in workload.trainable and "connector" not in workload.trainable:
        return 0
    eagle, vision = shapes.eagle, shapes.eagle.vision
    e, statistic = workload.element_size, _layer_norm_statistic(workload)
    tiles, h, c = shapes.own_tiles(workload.tiles), shapes.h, shapes.c
    kept = 0
    if "vision" in workload.trainable:
        p = tiles * vision.num_patches
        layer = vision_layer(shapes, workload).kept(workload.recompute.vision)
        pixels = tiles * vision.num_channels * vision.image_size**2 * e
        kept = pixels + vision.num_hidden_layers * layer + p * (c * e + 2 * statistic)  # and the final norm
    tokens, shuffled = tiles * eagle.tokens_per_tile, c * eagle.shuffle_factor**2
    # The connector's norm; before and after its GELU; the features that this rank's tokens received.
    kept += tokens * (2 * shuffled * e + 2 * statistic)
    kept += 2 * tokens * h // shapes.vision_ranks * e
    image_tokens = workload.tiles * eagle.tokens_per_tile
    return kept + image_tokens * shapes.r // shapes.length * h * e


def _layer_norm_statistic(workload: Workload) -> int:
    """Bytes of a mean or a deviation as torch's LayerNorm keeps it."""
    return FP32 if workload.device == "cuda" else workload.element_size

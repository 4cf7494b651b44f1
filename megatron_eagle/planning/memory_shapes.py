"""What a rank keeps: its parameters, and the activations that each layer keeps for its backward, in bytes.

Counted from shapes; nothing is fitted to a measurement. Each line names the tensors that the layer's code
keeps; `tests/planning/test_memory_model.py` compares the counts with what autograd really saves.

Letters: those of `model.shapes`, and e bytes of an element.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from megatron_eagle.model.flops import PARTS
from megatron_eagle.model.lora import LoraConfig, Target
from megatron_eagle.model.parts import NEW_TOKEN_ROWS
from megatron_eagle.model.shapes import LocalShapes, PackShapes, StageShapes
from megatron_eagle.model.specs import RecomputeConfig

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Workload:
    """What every data parallel rank computes in one step."""

    sequence_length: int  # tokens of a pack
    tiles: int  # of a pack
    microbatches: int  # packs of a data parallel rank and step
    precision: Literal["bf16", "fp32"] = "bf16"
    longest_document: int | None = None  # tokens; None: a pack is one document
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    trainable: Collection[str] = PARTS  # as `optimizer.trainable`
    lora: LoraConfig | None = None  # adapters train in place of the language model's weights
    # Of `layers`: the fused loss, and whether it adds its weight's gradient to the fp32 buffer at once. All
    # tokens are taken as supervised.
    fused_loss: bool = False
    loss_into_main_grad: bool = False
    # "cpu" counts the reference attention's score matrices and the packs of the step; "cuda" a fused
    # attention kernel, whose memory is linear in the sequence.
    device: Literal["cuda", "cpu"] = "cuda"
    eager: bool = False  # `layers.kernels`: plain torch's norms and SwiGLU on a GPU, too
    # Of the GPU: attention takes so many blocks at a time, each with a gradient of q if it is deterministic.
    multiprocessors: int = 132
    deterministic: bool = True  # `training.deterministic`

    @property
    def fused_kernels(self) -> bool:
        """Whether norms and SwiGLU are this project's Triton kernels."""
        return self.device == "cuda" and not self.eager

    @property
    def computed_again(self) -> Collection[str]:
        """Of core_attn and mlp, what backward computes again in every language layer. Experts are its mlp."""
        if self.recompute.language == "full":
            return "core_attn", "mlp"
        if self.recompute.language == "selective":
            modules = self.recompute.recompute_modules or ("core_attn",)
            return tuple("mlp" if name == "moe" else name for name in modules)
        return ("mlp",) if self.recompute.language == "offload" else ()

    @property
    def language_weights(self) -> bool:
        """Whether the language model's own weights have gradients."""
        return "language" in self.trainable and self.lora is None

    def keeps(self, *targets: Target) -> bool:
        """Whether what these linear layers of the language model read waits for the backward of a weight."""
        adapted = self.lora is not None and any(target in self.lora.target_modules for target in targets)
        return self.language_weights or adapted

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
    adapters: int = 0  # of LoRA, which train in place of the language model
    experts: int = 0  # of the language model, of which other ranks have copies than of the rest

    @property
    def total(self) -> int:
        return self.language + self.vision + self.connector + self.adapters

    def trained(self, trainable: Collection[str]) -> int:
        """Elements with a gradient buffer."""
        rows = self.token_rows if NEW_TOKEN_ROWS in trainable else 0
        language = self.adapters or self.language
        parts = {"vision": self.vision, "connector": self.connector, "language": language}
        return rows + sum(size for part, size in parts.items() if part in trainable)

    def trained_experts(self, trainable: Collection[str]) -> int:
        """Of `trained`, the experts'."""
        return self.experts if "language" in trainable and not self.adapters else 0

    def vision_and_connector(self, trainable: Collection[str]) -> int:
        """Elements of encoder and connector with a gradient buffer."""
        return self.trained([part for part in trainable if part in ("vision", "connector")])


def count_parameters(shapes: LocalShapes, stage: StageShapes, lora: LoraConfig | None = None) -> Parameters:
    """Parameters of a rank of a pipeline stage, with adapters on its language layers."""
    eagle, vision, h = shapes.eagle, shapes.eagle.vision, shapes.h
    qkv, fc1 = shapes.q + 2 * shapes.kv, 2 * h * shapes.f
    family, d = eagle.text.family, eagle.text.head_dim
    small = (qkv if family.qkv_bias else 0) + (2 * d if family.qk_norm else 0)
    mlp, router = fc1 + fc1 // 2, 0
    if eagle.text.experts is not None:
        mlp, router = shapes.own_experts * mlp, eagle.text.experts.num_experts * h
    layer = h * qkv + small + shapes.q * h + mlp + router + 2 * h
    experts = stage.layers * mlp if router else 0
    vocabulary = shapes.vocabulary * h
    # Tied embeddings are one tensor only where one stage has both ends.
    ends = 1 if stage.first and stage.last and eagle.text.tie_word_embeddings else stage.first + stage.last
    language = stage.layers * layer + ends * vocabulary + (h if stage.last else 0)
    largest = max(fc1, vocabulary if ends else 0)
    adapters = 0 if lora is None else stage.layers * _adapters(shapes, lora)
    if not stage.first:
        return Parameters(language, ends * vocabulary, 0, 0, largest, adapters, experts)
    t, c, i = shapes.vision_ranks, shapes.c, vision.intermediate_size
    patch = vision.num_channels * vision.patch_size**2 * c + c
    block = (3 * c * c + 3 * c + c * c + c * i + i + i * c) // t + 2 * c + 4 * c
    encoder = patch + vision.num_patches * c + vision.num_hidden_layers * block + 2 * c
    shuffled = c * eagle.shuffle_factor**2
    connector = 2 * shuffled + (shuffled * h + h + h * h) // t + h
    return Parameters(language, ends * vocabulary, encoder, connector, largest, adapters, experts)


def _adapters(shapes: LocalShapes, lora: LoraConfig) -> int:
    """Elements of one layer's adapters on a tensor parallel rank: A and B of each target."""
    h, q, kv, f = shapes.h, shapes.q, shapes.kv, shapes.f
    # In and out features of the rank's share of A and B.
    features: dict[Target, int] = {
        "q_proj": h + q,
        "k_proj": h + kv,
        "v_proj": h + kv,
        "o_proj": q + h,
        "gate_proj": h + f,
        "up_proj": h + f,
        "down_proj": f + h,
    }
    return lora.rank * sum(features[target] for target in lora.target_modules)


def rms_norm_bytes(r: int, h: int, workload: Workload, *, read: bool = True) -> int:
    """RMSNorm. The Triton kernel keeps its input, 1 / deviation and, where the next layer must (`read`), its
    output. Plain torch has an fp32 input (itself in fp32) and a rounded beside the scaled output."""
    e, output = workload.element_size, h * workload.element_size if read else 0
    inside = h * e if workload.fused_kernels else h * (FP32 + (e if workload.language_weights else 0))
    return r * (inside + output + FP32)


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that a layer keeps for its backward."""

    attention: int  # input norm, projections and core attention
    mlp: int  # second norm and feed-forward
    input: int  # the layer's input, which full recomputation keeps alone
    output: int  # of core attention, which offload keeps beside the input and the statistics
    statistics: int  # log-sum-exp of the softmax
    feed_forward: int  # of `mlp`, what computing the MLP again brings back

    @property
    def total(self) -> int:
        return self.attention + self.mlp

    @property
    def offloaded(self) -> int:
        """Bytes that an offloaded layer moves to host memory."""
        return self.input + self.output + self.statistics

    def kept(
        self, recompute: Literal["none", "selective", "full", "offload"], modules: Collection[str] = ()
    ) -> int:
        """Bytes that wait on the device for the layer's backward; under `offload`, if it stays there.

        Core attention keeps q, k, v and its output, and the projections around it keep them anyway:
        recomputing it saves the statistics alone.

        Args:
            modules: what `selective` computes again.
        """
        if recompute == "full":
            return self.input
        if recompute == "offload":
            return self.offloaded
        again = modules if recompute == "selective" else ()
        saved = {"core_attn": self.statistics, "mlp": self.feed_forward}
        return self.total - sum(saved[module] for module in again)


def language_layer(shapes: PackShapes, workload: Workload) -> LayerActivations:
    """What one language layer keeps for one microbatch.

    A linear layer whose weight is frozen keeps nothing; adapters keep what they read and make of it.
    """
    e, s, r, h, f = workload.element_size, shapes.s, shapes.r, shapes.h, shapes.f
    q, kv, keeps = shapes.q, shapes.kv, workload.keeps
    before = rms_norm_bytes(r, h, workload, read=keeps("q_proj", "k_proj", "v_proj"))
    # An MLP that is computed again keeps what it reads.
    again = workload.recompute.language == "selective" and "mlp" in workload.computed_again
    between = rms_norm_bytes(r, h, workload, read=again or keeps("gate_proj", "up_proj"))
    statistics, d = s * shapes.heads * FP32, shapes.eagle.text.head_dim
    # The joint projection (whose slice is v), rotated q and k, the output. (All layers share one table of
    # cosines and sines.)
    joint, core = q + 2 * kv, q + kv + q
    if shapes.ulysses > 1:  # which keeps what it was given, and its output on either side
        core, joint = q + 2 * shapes.attention_kv_heads * shapes.ulysses * d + 2 * q, 0
    attention = s * e * (joint + core) + statistics
    if shapes.eagle.text.family.qk_norm:
        attention += _head_norms(shapes, workload)
    # Gate and up, silu(gate) where the kernel is the eager one, their product.
    product = f if keeps("down_proj") and not workload.recompute.swiglu else 0
    mlp = s * e * (2 * f + (0 if workload.fused_kernels else f) + product)
    if shapes.eagle.text.experts is not None:
        mlp = _experts(shapes, workload)
    low = 0 if workload.lora is None else s * e * workload.lora.rank
    targets = () if workload.lora is None else workload.lora.target_modules
    attention += low * sum(target in ("q_proj", "k_proj", "v_proj", "o_proj") for target in targets)
    mlp += low * sum(target in ("gate_proj", "up_proj", "down_proj") for target in targets)
    return LayerActivations(before + attention, between + mlp, r * h * e, s * e * q, statistics, mlp)


def _head_norms(shapes: PackShapes, workload: Workload) -> int:
    """The norms of queries and keys, before they are rotated. The kernel reads a copy of the queries, and the
    keys, as the values, in the joint projection: with Ulysses that is kept for it."""
    s, d, heads = shapes.s, shapes.eagle.text.head_dim, shapes.heads + shapes.kv_heads
    kept = rms_norm_bytes(s * heads, d, workload, read=False)
    if not workload.fused_kernels:
        return kept
    joint = shapes.q + shapes.kv if shapes.ulysses > 1 else -shapes.kv
    return kept + s * workload.element_size * joint


def _experts(shapes: PackShapes, workload: Workload) -> int:
    """What a layer's experts keep beside their input, if each of them gets equally many tokens."""
    experts, e = shapes.eagle.text.experts, workload.element_size
    assert experts is not None, "it was asked"
    f, k, number = shapes.f, experts.num_experts_per_tok, experts.num_experts
    sent, got = shapes.r * k, shapes.routed_rows
    trained = workload.language_weights
    # The softmax and which are the k best of it; before they are divided by their sum, they and that.
    chosen = shapes.r * number * FP32 + sent * INT64
    chosen += (sent + shapes.r) * FP32 if experts.norm_topk_prob else 0
    # Who goes where: a mask, weights in the order of experts, and rows.
    routes = shapes.r * number * (1 + FP32) + sent * INT64
    # Their rows; gate and up, with an eager kernel silu(gate); their product, and that times its weight.
    inside = (shapes.h if trained else 0) + 2 * f + (0 if workload.fused_kernels else f) + f
    return chosen + routes + got * (inside * e + FP32 + (f * e if trained else 0))


def vision_layer(shapes: PackShapes, workload: Workload) -> LayerActivations:
    """What one layer of the vision encoder keeps for one microbatch."""
    vision, e, t = shapes.eagle.vision, workload.element_size, shapes.vision_ranks
    p, c, i = shapes.own_tiles(workload.tiles) * vision.num_patches, shapes.c, shapes.i
    norm = p * (2 * c * e + 2 * _layer_norm_statistic(workload))  # input and output
    statistics = p * vision.num_attention_heads // t * FP32
    attention = p * e * (3 * c // t + c // t) + statistics  # joint projection, output
    mlp = p * e * 2 * i  # before and after the GELU
    return LayerActivations(norm + attention, norm + mlp, p * c * e, p * e * c // t, statistics, mlp)


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
    read = 1 if "connector" in workload.trainable else 0  # its linear layers keep what they read
    kept += tokens * ((1 + read) * shuffled * e + 2 * statistic)
    kept += (1 + read) * tokens * h // shapes.vision_ranks * e
    image_tokens = workload.tiles * eagle.tokens_per_tile
    return kept + image_tokens * shapes.r // shapes.length * h * e


def _layer_norm_statistic(workload: Workload) -> int:
    """Bytes of a mean or a deviation as torch's LayerNorm keeps it."""
    return FP32 if workload.device == "cuda" else workload.element_size

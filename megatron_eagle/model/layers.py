"""Implementations of linear layers, norms, SwiGLU and the loss, and the choice between them.

All have the same parameter names, so that a checkpoint fits every choice. What an optional library
offers is looked up by importing it: without Transformer Engine its names in Megatron are mocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from eagle_kernels.dispatch import Implementation, explain
from eagle_kernels.layer_norm import layer_norm
from eagle_kernels.linear_cross_entropy import why_not_fused
from eagle_kernels.rms_norm import rms_norm
from eagle_kernels.swiglu import forget_product, swiglu
from megatron_eagle.context_parallel.backends import AttentionName, unfit
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import LocalShapes
from megatron_eagle.runtime.libraries import import_or_none, why_not_library
from megatron_eagle.runtime.parallel import ParallelConfig


@dataclass
class LayersConfig:
    """Who computes what.

    `linear`: auto takes Transformer Engine on a GPU that has it, else Megatron's own. `norm`: auto takes this
    project's everywhere, which round as transformers' do; those of Transformer Engine round otherwise and are
    taken only by name. `apex` is its fused LayerNorm, in the encoder only.
    `kernels`: the form of this project's own norms, SwiGLU, rotation and loss; auto: Triton on a GPU, for
    sizes that it takes, else eager.
    `loss`: fused never holds the logits of a whole sequence (`eagle_kernels.linear_cross_entropy`), plain is
    Megatron's; auto: fused on a GPU. `loss_into_main_grad`: the fused loss adds the output weight's gradient
    straight to the fp32 buffer that gradients accumulate in.
    `gradient_accumulation_fusion`: Apex' kernel adds the language model's weight gradients to the buffer that
    they accumulate in. `fp8`: Transformer Engine multiplies in 8 bits in the language model's linear layers,
    with scales as `fp8_recipe` says. `cuda_graph_impl` is refused but for none: packs differ.
    `moe_token_dispatcher_type`: how tokens travel to their experts: all-to-all, or flex, DeepEP's kernels,
    which need a GPU and that library.
    `attention`: kernels of the language model's core attention (context_parallel/backends.py); auto: the
    first that works here, else the reference, which a GPU takes for short documents only.
    """

    linear: Literal["auto", "local", "transformer_engine"] = "auto"
    norm: Literal["auto", "local", "transformer_engine", "apex"] = "auto"
    kernels: Implementation = "auto"
    loss: Literal["auto", "fused", "plain"] = "auto"
    loss_into_main_grad: bool = False
    gradient_accumulation_fusion: bool = False
    fp8: Literal["e4m3", "hybrid"] | None = None
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = "alltoall"
    attention: AttentionName = "auto"


def check_layers(
    config: LayersConfig, dtype: torch.dtype, eagle: EagleConfig, parallel: ParallelConfig
) -> None:
    """The rules that hold on every machine; `choose_layers` and `choose_attention` look at this one.

    Raises:
        UserError: settings that contradict each other.
    """
    if config.kernels == "triton" and (obstacle := _not_for_triton(eagle, parallel)):
        raise UserError(f"layers.kernels triton: {obstacle}; choose auto or eager")
    if config.loss_into_main_grad and config.loss == "plain":
        raise UserError("layers.loss_into_main_grad needs layers.loss fused; set it, or leave this out")
    if config.attention not in ("auto", "reference") and (missing := unfit(dtype, eagle.text.head_dim)):
        raise UserError(f"layers.attention {config.attention}: {missing}; choose another or leave it at auto")


def _not_for_triton(eagle: EagleConfig, parallel: ParallelConfig) -> str | None:
    """The size that this project's Triton kernels cannot take, or None: rows are read 128 bits at a time."""
    shapes = LocalShapes(eagle, parallel)
    rows = {
        "hidden features of the language model": shapes.h,
        "hidden features of the vision encoder": shapes.c,
        "feed-forward features of a tensor parallel rank": shapes.f,
        "vocabulary rows of a tensor parallel rank": shapes.vocabulary,
    }
    if eagle.text.family.qk_norm:
        rows["channels of a head"] = eagle.text.head_dim
    for name, size in rows.items():
        if size % 16:
            return f"the {size} {name} are no multiple of 16"
    half = eagle.text.head_dim // 2
    return f"half of the head size, {half}, is no power of two" if half & (half - 1) else None


@dataclass(frozen=True)
class FusedLoss:
    """How the output layer and the loss are computed in one."""

    kernels: Implementation
    into_main_grad: bool


@dataclass(frozen=True)
class LayerClasses:
    """What specifications are built from, and why, in one line."""

    column_parallel_linear: Callable[..., Any]
    row_parallel_linear: Callable[..., Any]
    rms_norm: Callable[..., Any] | ModuleSpec
    layer_norm: Callable[..., Any] | ModuleSpec
    swiglu: ModuleSpec
    fused_loss: FusedLoss | None  # None: logits, then Megatron's cross-entropy
    kernels: Implementation
    attention: AttentionName
    grouped_experts: bool  # Transformer Engine multiplies with all experts of a rank in one
    options: Mapping[str, Any]  # Megatron's own, of the language model
    reason: str


class RMSNorm(torch.nn.Module):
    """Qwen2's norm. Megatron's own torch norm refuses sequence parallelism; this one marks its weight,
    whose gradient Megatron then sums over the tensor parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        kernels: Implementation = "auto",
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps, self.kernels = eps, kernels
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel
        self.weight: Tensor = weight

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.kernels)


class LayerNorm(torch.nn.LayerNorm):
    """The vision encoder's norm behind Megatron's constructor."""

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        kernels: Implementation = "auto",
        **_: Any,
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, self.kernels)


class SwiGLU(MegatronModule):
    """The language model's activation on the packed output of the first linear layer of an MLP."""

    def __init__(self, config: TransformerConfig, kernels: Implementation = "auto") -> None:
        super().__init__(config)
        self.kernels = kernels

    def forward(self, gate_up: Tensor) -> Tensor:
        # A linear layer does not keep its output: backward may write over it.
        return swiglu(gate_up, self.kernels, reuse_input=True)


class ProductFreeMLP(MLP):
    """Megatron's MLP, which computes the product that its last layer reads again in backward."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[r, 1, h] -> the same shape, and no bias."""
        gate_up, _ = self.linear_fc1(hidden_states)
        product = self.activation_func(gate_up)
        with forget_product(product, gate_up, self.activation_func.kernels):
            out: tuple[Tensor, None] = self.linear_fc2(product)
        return out


def mlp_module(kind: type[MLP], submodules: MLPSubmodules, group: ProcessGroup) -> type[MLP]:
    """`kind` with these parts over the tensor parallel `group`.

    A class, because each version of Megatron-Core hands other things to specifications of its own MLP, and
    warns about those of other versions or of other MLPs in every layer; a class it calls as it is.
    """

    class OverGroup(kind):
        def __init__(self, config: TransformerConfig, **_: Any) -> None:
            super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group)

    return OverGroup


def ready(module: torch.nn.Module) -> None:
    """What Megatron does before a module's forward, for weights that are read without one: with
    `parallel.overlap_param_gather` they may still be on their way from the ranks that have updated them."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def choose_layers(config: LayersConfig, eagle: EagleConfig, parallel: ParallelConfig) -> LayerClasses:
    """The classes that `config` stands for on this machine, for these sizes.

    Raises:
        UserError: it names a library that cannot be used here.
    """
    linear, norm, reason = _choose_library(config)
    on_gpu = torch.cuda.is_available()
    kernels, kernels_reason = _choose_kernels(config, eagle, parallel, on_gpu)
    column, row = ColumnParallelLinear, RowParallelLinear
    own = {"kernels": kernels}
    rms, layer = ModuleSpec(RMSNorm, params=own), ModuleSpec(LayerNorm, params=own)
    if "transformer_engine" in (linear, norm):
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TENorm,
            TERowParallelLinear,
        )

        if linear == "transformer_engine":
            column, row = TEColumnParallelLinear, TERowParallelLinear
        if norm == "transformer_engine":
            rms = layer = TENorm
    if norm == "apex":
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        layer = FusedLayerNorm
    no_fused = why_not_fused(torch.device("cuda")) if on_gpu and config.loss != "plain" else None
    if config.loss == "fused" and no_fused:
        raise UserError(f"layers.loss fused: {no_fused}; choose auto or plain")
    fused = config.loss == "fused" or (config.loss == "auto" and on_gpu and no_fused is None)
    if config.loss_into_main_grad and not fused:
        raise UserError("layers.loss_into_main_grad needs layers.loss fused; set it, or leave this out")
    reason += f", kernels: {kernels_reason}, loss: {'fused' if fused else 'plain'}"
    if no_fused:
        reason += f" (auto: {no_fused})"
    return LayerClasses(
        column,
        row,
        rms,
        layer,
        ModuleSpec(SwiGLU, params=own),
        FusedLoss(kernels, config.loss_into_main_grad) if fused else None,
        kernels,
        config.attention,
        linear == "transformer_engine",
        _choose_options(config, eagle, parallel, linear),
        reason,
    )


def _choose_options(
    config: LayersConfig, eagle: EagleConfig, parallel: ParallelConfig, linear: str
) -> dict[str, Any]:
    """Megatron's options of the language model's linear layers and experts.

    Raises:
        UserError: what one needs is not here.
    """
    options: dict[str, Any] = {}
    if config.gradient_accumulation_fusion:
        missing = why_not_library("fused_weight_gradient_mlp_cuda")
        if missing:
            raise UserError(
                f"layers.gradient_accumulation_fusion: {missing}; it is built with Apex, or leave this out"
            )
        options["gradient_accumulation_fusion"] = True
    if parallel.tp_comm_overlap and linear == "local":
        raise UserError("parallel.tp_comm_overlap needs Transformer Engine's linear layers; set it to false")
    if eagle.text.experts is not None:
        missing = why_not_library("deep_ep")
        if config.moe_token_dispatcher_type == "flex" and missing:
            raise UserError(f"layers.moe_token_dispatcher_type flex: {missing}; choose alltoall")
        options["moe_token_dispatcher_type"] = config.moe_token_dispatcher_type
        options["moe_grouped_gemm"] = linear == "transformer_engine"
    if config.fp8 is not None:
        missing = why_not_fp8(config.fp8_recipe) if linear != "local" else "it needs Transformer Engine"
        if missing:
            raise UserError(f"layers.fp8 {config.fp8}, {config.fp8_recipe}: {missing}; leave it out")
        options |= {"fp8": config.fp8, "fp8_recipe": config.fp8_recipe}
    return options


def why_not_fp8(recipe: str) -> str | None:
    """Why Transformer Engine cannot multiply by this recipe here, or None if it can."""
    names = {"mxfp8": "check_mxfp8_support", "blockwise": "check_fp8_block_scaling_support"}
    for place in ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8"):
        check = getattr(import_or_none(place), names.get(recipe, "check_fp8_support"), None)
        if check is not None:
            supported, why = check()
            return None if supported else str(why)
    return f"this Transformer Engine has no {names.get(recipe, 'check_fp8_support')}"


def _choose_library(config: LayersConfig) -> tuple[str, str, str]:
    """Whose linear layers and whose norms, and why in words.

    Raises:
        UserError: one that is not here.
    """
    no_engine, no_apex = why_not_library("transformer_engine.pytorch"), why_not_library("apex.normalization")
    linear = config.linear
    if linear == "auto":
        linear = "local" if no_engine else "transformer_engine"
    norm = "local" if config.norm == "auto" else config.norm
    for name, choice in (("linear", linear), ("norm", norm)):
        missing = {"transformer_engine": no_engine, "apex": no_apex}.get(choice)
        if missing:
            raise UserError(f"layers.{name} {choice}: {missing}; choose another or leave it at auto")
    reason = f"linear layers: {linear}, norms: {norm}"
    if no_engine and config.linear == "auto":
        reason += f" (linear layers: auto, without Transformer Engine: {no_engine})"
    return linear, norm, reason


def _choose_kernels(
    config: LayersConfig, eagle: EagleConfig, parallel: ParallelConfig, on_gpu: bool
) -> tuple[Implementation, str]:
    """The form of this project's kernels, and why in words.

    Raises:
        UserError: one that cannot run here.
    """
    try:
        use_triton, reason = explain(config.kernels, torch.device("cuda" if on_gpu else "cpu"))
    except ValueError as error:
        raise UserError(f"layers.{error}") from None
    if use_triton and config.kernels == "auto" and (obstacle := _not_for_triton(eagle, parallel)):
        return "eager", f"eager (auto: {obstacle})"
    return config.kernels, reason

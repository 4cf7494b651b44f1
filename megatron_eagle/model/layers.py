"""Implementations of linear layers and norms, and the choice between them.

All have the same parameter names, so that a checkpoint fits every choice. What an optional library
offers is looked up by importing it: without Transformer Engine its names in Megatron are mocks.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from eagle_kernels.rms_norm import rms_norm
from megatron_eagle.errors import UserError


@dataclass
class LayersConfig:
    """Who computes linear layers and norms. `auto` takes Transformer Engine on a GPU that has it, else
    Megatron's own linear layers and eager norms. `apex` is its fused LayerNorm, in the tower only."""

    linear: Literal["auto", "local", "transformer_engine"] = "auto"
    norm: Literal["auto", "eager", "transformer_engine", "apex"] = "auto"


@dataclass(frozen=True)
class LayerClasses:
    """What specifications are built from, and why, in one line."""

    column_parallel_linear: Callable
    row_parallel_linear: Callable
    rms_norm: Callable
    layer_norm: Callable
    reason: str


class RMSNorm(torch.nn.Module):
    """Qwen2's norm. Megatron's own torch norm refuses sequence parallelism; this one marks its weight,
    whose gradient Megatron then sums over the tensor parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """The tower's norm behind Megatron's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


def why_not(module: str) -> str | None:
    """Why an optional library for the GPU cannot be used here, or None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{module} does not import: {error}"
    return None


def choose_layers(config: LayersConfig) -> LayerClasses:
    """The classes that `config` stands for on this machine.

    Raises:
        UserError: it names a library that cannot be used here.
    """
    no_engine, no_apex = why_not("transformer_engine.pytorch"), why_not("apex.normalization")
    linear, norm = config.linear, config.norm
    if linear == "auto":
        linear = "local" if no_engine else "transformer_engine"
    if norm == "auto":
        norm = "eager" if no_engine else "transformer_engine"
    for name, choice in (("linear", linear), ("norm", norm)):
        missing = {"transformer_engine": no_engine, "apex": no_apex}.get(choice)
        if missing:
            raise UserError(f"layers.{name} {choice}: {missing}; choose another or leave it at auto")
    column, row = ColumnParallelLinear, RowParallelLinear
    rms, layer = RMSNorm, LayerNorm
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
    reason = f"linear layers: {linear}, norms: {norm}"
    if no_engine and "auto" in (config.linear, config.norm):
        reason += f" (auto, without Transformer Engine: {no_engine})"
    return LayerClasses(column, row, rms, layer, reason)

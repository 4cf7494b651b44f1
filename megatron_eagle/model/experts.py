"""A mixture of experts in place of a language layer's MLP, on Megatron's router, dispatcher and experts.

A rank holds some experts of each layer (expert parallelism), whole or its part of their tensor parallelism. A
router on each rank chooses k of E experts for each of its rows; the rows travel to whoever holds them
(all-to-all), through them, and back.

The auxiliary loss keeps experts equally busy. Of a layer and a pack it is E * sum_i f_i P_i, where f_i counts
how often expert i was chosen and P_i sums its probability, each divided by the pack's tokens: transformers'
`load_balancing_loss_func` of that layer. A step's is its mean over layers and packs, times
`router_aux_loss_coef`. Each rank adds its own rows' part; parts add up to the whole, as gradients do.
(Megatron's own is a sum over layers, counts padding, and under `calculate_per_token_loss` is multiplied by a
rank's tokens, for a division by a token count that this project's loss does not have.)

Shapes: r rows of a rank's hidden states, h hidden features, E experts, k of them a token's.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.pack_rows import PackRows
from megatron_eagle.model.layers import LayerClasses
from megatron_eagle.model.text import ExpertsConfig
from megatron_eagle.runtime.megatron_cpu import name_missing_router_product
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig

_EXPERTS = "mlp.experts."


def expert_options(experts: ExpertsConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Megatron's options of a language model whose every layer has experts."""
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.moe_intermediate_size,
        "ffn_hidden_size": experts.moe_intermediate_size,  # no layer has another MLP
        "moe_router_topk": experts.num_experts_per_tok,
        "moe_router_dtype": "fp32",
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",  # `ExpertRouter` has its own
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


class _WithLoss(torch.autograd.Function):
    """Passes its first argument on; in backward the second is a loss of weight 1."""

    @staticmethod
    def forward(_ctx: Any, passed: Tensor, _loss: Tensor) -> Tensor:
        return passed.view_as(passed)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_ones(())


def balance_loss(scores: Tensor, chosen: Tensor, rows: PackRows, group: ProcessGroup) -> Tensor:
    """This rank's part of a layer's auxiliary loss of its packs, before the coefficient. Collective.

    Args:
        scores: fp32 [r, E], the router's probabilities.
        chosen: bool [r, E], k a row.
        group: ranks that hold the other rows of the packs.
    """
    counts = rows.member @ chosen.float()
    torch.distributed.all_reduce(counts, group=group)
    parts = (rows.member @ scores) * counts / rows.tokens[:, None] ** 2
    return parts.sum() * scores.shape[1] * rows.share


class ExpertRouter(Router):
    """Chooses as `Qwen3MoeTopKRouter` does, with logits in fp32."""

    def __init__(
        self, config: TransformerConfig, experts: ExpertsConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config, pg_collection=groups)
        self.normalised = experts.norm_topk_prob
        self.loss_weight = experts.router_aux_loss_coef / config.num_layers
        self.balance: Tensor | float = 0.0  # what `take_balance` takes

    def forward(self, hidden: Tensor, rows: PackRows | None = None) -> tuple[Tensor, Tensor]:
        """hidden [r, 1, h] -> weights of experts, fp32 [r, E], 0 where they are not chosen; who is, bool."""
        logits = self.gating(hidden).view(-1, self.num_experts)
        return self.routing(logits, rows)

    def routing(self, logits: Tensor, rows: PackRows | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, from logits fp32 [r, E]."""
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        top, which = scores.topk(self.config.moe_router_topk, dim=-1)
        if self.normalised:
            top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(1, which, top)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, which, True)
        learns = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if learns and self.loss_weight and rows is not None:
            loss = balance_loss(scores, chosen, rows, self.tp_cp_group)
            self.balance = self.balance + loss.detach().double() / self.config.num_layers
            weights = _WithLoss.apply(weights, self.loss_weight * loss)  # type: ignore[no-untyped-call]
        return weights, chosen


class MixtureOfExperts(MoELayer):
    """Megatron's layer of experts, whose router knows the packs. `experts_module` gives it its parts."""

    rows: PackRows | None = None  # of the microbatch under way

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[r, 1, h] -> the same shape, and no bias."""
        rows = self.rows  # now: when it is computed again, another microbatch is under way

        def run(hidden: Tensor) -> Tensor:
            weights, chosen = self.router(hidden, rows)
            there = self.token_dispatcher
            x, weights = there.dispatch_preprocess(hidden, chosen, weights)
            x, weights = there.token_dispatch(x, weights)
            x, counts, weights = there.dispatch_postprocess(x, weights)
            x, _ = self.experts(x, counts, weights)
            x = there.token_combine(there.combine_preprocess(x))
            out: Tensor = there.combine_postprocess(x)
            # Megatron's dispatcher would keep them to its next run, and with their graph the input of a layer
            # that is computed again, and that input's gradient: of 48 layers 6 GB on each GPU.
            there.probs = there.routing_map = there.reversed_local_input_permutation_mapping = None
            return out

        out: Tensor = (
            checkpoint(run, False, hidden_states) if self.moe_layer_recompute else run(hidden_states)
        )
        return out, None


def experts_module(experts: ExpertsConfig, classes: LayerClasses, mesh: Mesh) -> type[MixtureOfExperts]:
    """The experts of a language layer, over the mesh.

    A class, for the reason that `layers.mlp_module` gives.
    """
    name_missing_router_product()
    kind, (linear_fc1, linear_fc2) = _kind(classes)
    parts = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2, activation_func=classes.swiglu)

    def router(config: TransformerConfig, **_: Any) -> ExpertRouter:
        return ExpertRouter(config, experts, mesh.groups)

    class OverMesh(MixtureOfExperts):
        def __init__(self, config: TransformerConfig, **_: Any) -> None:
            super().__init__(
                config,
                MoESubmodules(experts=_built(kind, parts, mesh), router=router),
                pg_collection=mesh.groups,
            )
            for name, parameter in self.experts.named_parameters():
                _mark(name, parameter)

    return OverMesh


def _built(kind: type[MegatronModule], parts: MLPSubmodules, mesh: Mesh) -> type[MegatronModule]:
    """A class again: Megatron calls no function here."""

    class OverMesh(kind):
        def __init__(self, number: int, config: TransformerConfig, **_: Any) -> None:
            super().__init__(number, config, parts, pg_collection=mesh.groups)

    return OverMesh


def _kind(classes: LayerClasses) -> tuple[type[MegatronModule], tuple[Any, Any]]:
    """Whose experts, and of which linear layers: all of a rank in one product, or one after the other."""
    if not classes.grouped_experts:
        return SequentialMLP, (classes.column_parallel_linear, classes.row_parallel_linear)
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )

    return TEGroupedMLP, (TEColumnParallelGroupedLinear, TERowParallelGroupedLinear)


def _mark(name: str, parameter: Any) -> None:
    """Say whose copies an expert's weight has, whatever layer it is of.

    Megatron marks them only under expert parallelism: without it, but with less tensor parallelism than the
    other layers, gradients of tensor parallel ranks would stay unsummed. Transformer Engine's
    grouped layers do not say that they are divided, and the gradient norm would leave out all ranks but one.
    """
    parameter.allreduce = False  # over the experts' data parallel ranks
    parameter.tensor_model_parallel = True
    parameter.partition_dim = 0 if "linear_fc1" in name else 1
    parameter.partition_stride = 1


def is_expert(name: str) -> bool:
    """Whether a parameter of this (global or local) name is an expert's."""
    return f".{_EXPERTS}" in name


def whole_model_expert(name: str, layer: TransformerLayer) -> str:
    """`name` of a parameter in `layer` with its expert counted over all ranks, the same for sequential and
    grouped experts: mlp.experts.7.linear_fc1.weight. Other names as they are."""
    if not name.startswith(_EXPERTS):
        return name
    first, rest = layer.mlp.local_expert_indices[0], name.removeprefix(_EXPERTS)
    if rest.startswith("local_experts."):
        _, number, rest = rest.split(".", 2)
    else:
        rest, number = rest.rstrip("0123456789"), rest[len(rest.rstrip("0123456789")) :]
    return f"{_EXPERTS}{first + int(number)}.{rest}"


class LanguageLayer(TransformerLayer):
    """Megatron's layer, whose experts know the packs that it runs on."""

    def forward(
        self, hidden_states: Tensor, *args: Any, packed_seq_params: PackedSequence, **others: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [r, 1, h] -> the same shape, and no context: the model has no cross-attention."""
        if isinstance(self.mlp, MixtureOfExperts):
            self.mlp.rows = packed_seq_params.pack_rows
        out: tuple[Tensor, None] = super().forward(
            hidden_states, *args, packed_seq_params=packed_seq_params, **others
        )
        return out


def routers(model: torch.nn.Module) -> Iterator[ExpertRouter]:
    """Those of a model chunk."""
    return (module for module in model.modules() if isinstance(module, ExpertRouter))


def take_balance(models: Iterable[torch.nn.Module], device: torch.device) -> Tensor:
    """This rank's part of the auxiliary loss, before the coefficient, that routers have learned from since it
    was last taken: fp64 [1]. Of no pack it is 0, and of none else."""
    taken = torch.zeros(1, dtype=torch.float64, device=device)
    for model in models:
        for router in routers(model):
            taken += router.balance
            router.balance = 0.0
    return taken

"""LoRA on the language model: trained low-rank matrices beside frozen linear layers, in every layout.

    y = W x + alpha / rank * B A x          (Hu et al. 2021, arXiv:2106.09685, section 4.1)

q, k, v, o, gate, up and down each have their own A and B, as in peft, although Megatron fuses q, k, v and
gate, up into one layer: their products are laid side by side as the fused layer's rows are.

Tensor parallelism (in, out: features; rank: of the product):

    q k v gate up   A [rank, in] on every rank           B [out / tp, rank]
    o down          A [rank, in / tp]                    B [out, rank] on every rank

Only the `rank` features between A and B travel between ranks, and backward makes every gradient whole:

    q k v gate up   Without sequence parallelism all ranks have all tokens. Each rank's share of B gives the
                    features a part of their gradient; the parts are summed on the way back, and A's gradient
                    is whole and equal everywhere. With it, the features of each rank's tokens are gathered,
                    and backward is a reduce-scatter: A's gradient then comes from each rank's own tokens.
    o down          Each rank's share of A gives a part of the features. Without sequence parallelism they
                    are summed, and B's gradient is whole and equal everywhere. With it they are
                    reduce-scattered, and B's gradient comes from each rank's own tokens.

A factor whose gradient comes from a rank's own tokens is marked `sequence_parallel`, as norm weights are:
Megatron sums its gradient over the tensor parallel ranks.

Shapes: s tokens of this context parallel rank, r rows of its hidden states (s, or s / tp under sequence
parallelism), b = 1.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.experts import MixtureOfExperts
from megatron_eagle.model.initialization import global_name, tensor_parallel_shard
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.ranges import Range, Ranged

# Hugging Face's modules of a layer, in the order in which Megatron fuses them.
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)
MLP_TARGETS: tuple[Target, ...] = ("gate_proj", "up_proj", "down_proj")


@dataclass
class LoraConfig(Ranged):
    """Adapters on `target_modules` of every language layer; in place of the layers' own weights they train.

    Raises:
        ValueError: naming the rule and the value.
    """

    rank: Annotated[int, Range(1, 4096)] = 16  # of each adapter's two matrices
    alpha: Annotated[float, Range(1e-3, 1e5)] = 32.0  # the adapters' product is scaled by alpha / rank
    target_modules: list[Target] = field(default_factory=lambda: list(TARGETS))
    # Of 0.1.0's run files. Adapters without it: a resumed run is exact, and every layout computes the same.
    FORMER: ClassVar[Mapping[str, float]] = {"dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise ValueError(f"target_modules is empty: name some of {', '.join(TARGETS)}")
        self.target_modules = [name for name in TARGETS if name in self.target_modules]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Adapter(torch.nn.Module):
    """The adapters of one Megatron layer: for each target `{target}_a` [rank, in], `{target}_b` [out, rank].

    Both are held and called together: Megatron's wrapper gathers a module's parameters when it is called.
    """

    # The axis of A and of B that tensor parallel ranks divide; None: every rank has the whole factor.
    split: Mapping[str, int | None]

    def __init__(
        self, sizes: Mapping[Target, tuple[int, int]], weight: Tensor, config: LoraConfig, model: EagleModel
    ) -> None:
        """`sizes`: in and out features of this rank by target; `weight`: the layer's, for type and device."""
        super().__init__()
        self.tp = model.mesh.tp
        self.sequence_parallel = model.config.sequence_parallel
        self.rank, self.scale = config.rank, config.scale
        self.targets = list(sizes)
        for target, (size_in, size_out) in sizes.items():
            for factor, shape in (("a", (self.rank, size_in)), ("b", (size_out, self.rank))):
                parameter: Any = torch.nn.Parameter(weight.new_empty(shape))
                axis = self.split[factor]
                if axis is None:
                    # Its gradient is of this rank's tokens alone: Megatron sums it over the ranks.
                    parameter.sequence_parallel = self.sequence_parallel
                else:
                    # Without it, the gradient norm would count rank 0's share and no other.
                    set_tensor_model_parallel_attributes(parameter, True, axis, 1)
                self.register_parameter(f"{target}_{factor}", parameter)

    def a(self, target: str) -> Tensor:
        return self.get_parameter(f"{target}_a")

    def b(self, target: str) -> Tensor:
        return self.get_parameter(f"{target}_b")

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's description for checkpoints: whole shapes, the same for every layout."""
        assert metadata is not None, "Megatron hands it down"
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: self.split[name[-1]] for name in state if self.split[name[-1]] is not None}
        groups = {"tp_group": self.tp.group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, axes, sharded_offsets, **groups
        )
        return sharded


class ColumnAdapter(_Adapter):
    """Beside a column parallel layer, whose rows on this rank are `groups` times `widths` features."""

    split = {"a": None, "b": 0}

    def __init__(
        self,
        widths: Mapping[Target, int],
        groups: int,
        weight: Tensor,
        config: LoraConfig,
        model: EagleModel,
    ) -> None:
        targets = [target for target in widths if target in config.target_modules]
        sizes = {target: (weight.shape[1], groups * widths[target]) for target in targets}
        super().__init__(sizes, weight, config, model)
        self.widths, self.groups = dict(widths), groups

    def forward(self, x: Tensor) -> Tensor:
        """[r, b, in] -> [s, b, out / tp], in the fused layer's order."""
        low = F.linear(x, torch.cat([self.a(target) for target in self.targets])) * self.scale
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp.group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp.group)
        by_target = dict(zip(self.targets, low.split(self.rank, -1), strict=True))
        lead = low.shape[:-1]
        parts = [
            F.linear(by_target[name], self.b(name)).view(*lead, self.groups, width)
            if name in by_target
            else low.new_zeros(*lead, self.groups, width)
            for name, width in self.widths.items()
        ]
        return torch.cat(parts, -1).flatten(-2)


class RowAdapter(_Adapter):
    """Beside a row parallel layer."""

    split = {"a": 1, "b": None}

    def __init__(self, target: Target, weight: Tensor, config: LoraConfig, model: EagleModel) -> None:
        super().__init__({target: (weight.shape[1], weight.shape[0])}, weight, config, model)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in / tp] -> [r, b, out]."""
        [target] = self.targets
        low = F.linear(x, self.a(target)) * self.scale
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp.group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp.group)
        return F.linear(low, self.b(target))


def add_lora(models: Iterable[EagleModel], config: LoraConfig, *, seed: int = 0) -> None:
    """Freeze the language model and put adapters on it, in place; before the data-parallel wrapper is put on.

    Vision encoder and connector stay as they are. The adapters are fresh (`seed`): B is zero, so that nothing
    changes yet. Weights that are to be loaded or drawn for a model without adapters come before this call, a
    checkpoint with adapters after it.

    Raises:
        UserError: as `check_targets`.
    """
    for model in models:
        check_targets(config, model.eagle)
        model.language_model.requires_grad_(False)
        for layer in model.language_model.decoder.layers:
            _adapt(layer, config, model)
        _initialize(model, seed)


def adapters(model: EagleModel) -> Iterator[tuple[int, Target, Tensor, Tensor]]:
    """(global layer number from 0, target, A, B) of everything `add_lora` put on one pipeline chunk."""
    for layer in model.language_model.decoder.layers:
        for module in layer.modules():
            if isinstance(module, _Adapter):
                for target in module.targets:
                    yield layer.layer_number - 1, target, module.a(target), module.b(target)


def check_targets(config: LoraConfig, eagle: EagleConfig) -> None:
    """
    Raises:
        UserError: adapters on what the language model does not have.
    """
    of_mlp = [name for name in config.target_modules if name in MLP_TARGETS]
    if of_mlp and eagle.text.experts is not None:
        others = [name for name in TARGETS if name not in MLP_TARGETS]
        raise UserError(
            f"lora.target_modules {', '.join(of_mlp)}: the model has experts in place of an MLP, and "
            f"adapters on experts are not built; choose among {', '.join(others)}"
        )


def check_same_lora(config: LoraConfig | None, saved: LoraConfig | None, where: Any) -> None:
    """Refuse a checkpoint `where` whose adapters are not those of the run.

    Raises:
        UserError: what each of them has.
    """
    if config != saved:
        raise UserError(
            f"{where}: its LoRA adapters are {_described(saved)}, the run's lora section wants "
            f"{_described(config)}; make them equal, or merge them (`megatron-eagle convert`: export, import)"
        )


def _described(config: LoraConfig | None) -> str:
    if config is None:
        return "(none)"
    return f"(rank {config.rank}, alpha {config.alpha:g}, {'+'.join(config.target_modules)})"


def _adapt(layer: TransformerLayer, config: LoraConfig, model: EagleModel) -> None:
    attention, mlp = layer.self_attention, layer.mlp
    head, groups = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
    queries = attention.num_attention_heads_per_partition // groups * head
    columns: list[tuple[Any, str, Mapping[Target, int], int]] = [
        (attention, "qkv", {"q_proj": queries, "k_proj": head, "v_proj": head}, groups),
    ]
    rows: list[tuple[Any, str, Target]] = [(attention, "proj", "o_proj")]
    if not isinstance(mlp, MixtureOfExperts):
        gate = mlp.linear_fc1.weight.shape[0] // 2
        columns.append((mlp, "fc1", {"gate_proj": gate, "up_proj": gate}, 1))
        rows.append((mlp, "fc2", "down_proj"))
    beside: list[tuple[Any, str, _Adapter]] = []
    for owner, name, widths, fused_groups in columns:
        if any(target in config.target_modules for target in widths):
            weight = getattr(owner, f"linear_{name}").weight
            beside.append((owner, name, ColumnAdapter(widths, fused_groups, weight, config, model)))
    for owner, name, target in rows:
        if target in config.target_modules:
            weight = getattr(owner, f"linear_{name}").weight
            beside.append((owner, name, RowAdapter(target, weight, config, model)))
    for owner, name, adapter in beside:
        # Beside the layer, not around it: the base keeps its parameter names, here and in checkpoints.
        owner.add_module(f"lora_{name}", adapter)
        getattr(owner, f"linear_{name}").register_forward_hook(_adding(adapter))


def _adding(adapter: _Adapter) -> Callable[..., tuple[Any, ...]]:
    def hook(_: torch.nn.Module, inputs: Sequence[Any], output: tuple[Any, ...]) -> tuple[Any, ...]:
        return output[0] + adapter(inputs[0]), *output[1:]

    return hook


@torch.no_grad()
def _initialize(model: EagleModel, seed: int) -> None:
    """A as peft's (kaiming uniform with a = sqrt 5: within 1 / sqrt(in)), from its global name; B zero."""
    tp = model.mesh.tp
    for local_name, parameter in model.named_parameters():
        if ".lora_" not in local_name:
            continue
        if local_name.endswith("_b"):
            parameter.zero_()
            continue
        name = global_name(local_name, model)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        rows, columns = parameter.shape
        split = getattr(parameter, "tensor_model_parallel", False)
        full = torch.empty(rows, columns * (tp.size if split else 1))
        bound = 1 / math.sqrt(full.shape[1])
        full.uniform_(-bound, bound, generator=generator)
        parameter.copy_(tensor_parallel_shard(full, name, 1, tp.size, tp.rank) if split else full)

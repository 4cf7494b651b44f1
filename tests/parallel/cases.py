"""One tiny model, one fixed global batch, any layout: the loss and every parameter gradient.

The batch has four packs of 64 tokens with several documents each: images of uneven tile counts, one
of them cut by the boundaries that context and sequence parallelism introduce, a text-only pack and a
padding tail. Runs the same wrapper, loss and schedule as training.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_eagle.data.loading.batch import join
from megatron_eagle.data.loading.packs import TokenPack
from megatron_eagle.model.eagle import EagleModel, ModelInput, build_model
from megatron_eagle.model.experts import is_expert
from megatron_eagle.model.initialization import global_name, initialize_parameters, is_gated
from megatron_eagle.model.inputs import Balance, make_input
from megatron_eagle.model.language import Targets
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.presets import EagleConfig, preset
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.model.text import ExpertsConfig, TextSection
from megatron_eagle.model.yarn import YarnConfig
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training import schedule
from megatron_eagle.training.optimizer import wrap_models

LENGTH = 64
IMAGE_TOKEN = 7
# Per pack: document lengths (the last may be padding) and (first token, tiles) of each image.
PACKS = [
    ([24, 8, 32], [(2, 1), (14, 1), (34, 3)]),
    ([10, 40, 14], []),
    ([64], [(10, 3), (28, 2)]),
    ([5, 1, 50, 8], [(8, 2), (30, 1)]),
]


@dataclass(frozen=True)
class Layout:
    """A cell of the parity table."""

    name: str
    world_size: int
    parallel: dict = field(default_factory=dict)
    packs: int = 1  # in each sequence
    recompute: RecomputeConfig | None = None
    text: dict = field(default_factory=dict)  # of the language model, where it is not `tiny_model`'s

    @property
    def config(self) -> ParallelConfig:
        """What its groups are built for."""
        return ParallelConfig(**self.parallel).joined(self.packs)

    def __str__(self) -> str:
        return self.name


@dataclass
class Outcome:
    """What a layout computed: the loss of the global batch and the gradient of every parameter."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def errors(self, reference: "Outcome") -> dict[str, float]:
        """max |g - ref| / max |ref| per tensor, and the loss's relative error under "loss"."""
        assert self.gradients.keys() == reference.gradients.keys()
        errors = {"loss": abs(self.loss - reference.loss) / abs(reference.loss)}
        for name, expected in reference.gradients.items():
            difference = (self.gradients[name] - expected).abs().max()
            errors[name] = (difference / expected.abs().max()).item()
        return errors

    def worst(self, reference: "Outcome") -> tuple[float, str]:
        """The largest error and the tensor that has it."""
        return max((error, name) for name, error in self.errors(reference).items())


def tiny_model(**text) -> EagleConfig:
    """Four language layers (for pipelines), eight real rows short of the padded vocabulary."""
    section = preset("tiny")
    if "experts" in text:
        text = text | {"experts": ExpertsConfig(**text["experts"])}
    section.text = TextSection(**{"num_attention_heads": 8, "num_key_value_heads": 4} | text)
    return section.with_data(vocab_size=504, image_token_index=IMAGE_TOKEN)


def global_batch(eagle: EagleConfig) -> list[dict]:
    """The four packs as keyword arguments of `make_input`; weights sum to about one."""
    batch = []
    for number, (documents, images) in enumerate(PACKS):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(8, eagle.text.vocab_size, (LENGTH,), generator=generator)
        bounds = [0, *torch.tensor(documents).cumsum(0).tolist()]
        positions = torch.cat([torch.arange(n) for n in documents])
        weights = torch.rand(LENGTH, generator=generator) * (torch.rand(LENGTH, generator=generator) < 0.6)
        weights[[end - 1 for end in bounds[1:]]] = 0
        for start, tiles in images:
            ids[start : start + tiles * eagle.tokens_per_tile] = IMAGE_TOKEN
        labels = torch.cat([ids[1:], ids[:1]])
        weights[labels == IMAGE_TOKEN] = 0
        # The last document of the last pack is padding to routers.
        filled = torch.arange(LENGTH) < (bounds[-2] if number == len(PACKS) - 1 else LENGTH)
        size = eagle.vision.image_size
        tiles = sum(count for _, count in images)
        batch.append(
            {
                "input_ids": ids,
                "position_ids": positions,
                "document_bounds": bounds,
                "labels": labels,
                "loss_weights": weights / 60,
                "filled": filled,
                "pixel_values": torch.rand(tiles, 3, size, size, generator=generator) * 2 - 1,
            }
        )
    return batch


def in_sequences(batch: list[dict], packs: int) -> list[dict]:
    """The batch in sequences of several packs: twice, at half the weight, and the second time backwards. Loss
    and gradients stay, and packs meet others."""
    if packs == 1:
        return batch
    twice = [pack | {"loss_weights": pack["loss_weights"] / 2} for pack in (*batch, *batch[::-1])]
    return [_end_to_end(twice[i : i + packs]) for i in range(0, len(twice), packs)]


def _end_to_end(packs: list[dict]) -> dict:
    tensors = "input_ids", "position_ids", "document_bounds", "labels", "loss_weights"
    whole = join(
        [
            TokenPack(
                **{name: pack[name] for name in tensors},
                group_ids=torch.zeros_like(pack["labels"]),
                n_tiles=len(pack["pixel_values"]),
                samples=[],
            )
            for pack in packs
        ]
    )
    others = {name: torch.cat([pack[name] for pack in packs]) for name in ("pixel_values", "filled")}
    return {name: getattr(whole, name) for name in tensors} | others


def with_targets(pack: dict) -> dict:
    """A pack as `make_input` takes it; all its tokens are in one group."""
    labels, weights = pack["labels"], pack["loss_weights"]
    others = {name: x for name, x in pack.items() if name not in ("labels", "loss_weights", "filled")}
    return others | {"targets": Targets(labels, weights, torch.zeros_like(labels))}


def gather_gradients(mesh: Mesh, wrapped: list) -> None:
    """Complete the gradient buffers: the distributed optimizer leaves each rank the sum of its shard."""
    for model in wrapped:
        for buffers, axis in ((model.buffers, mesh.dp_cp), (model.expert_parallel_buffers, mesh.expt_dp)):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                full = bucket.grad_data
                shard = full.chunk(axis.size)[axis.rank].clone()
                torch.distributed.all_gather_into_tensor(full, shard, group=axis.group)


def run(
    layout: Layout,
    eagle: EagleConfig,
    dtype: torch.dtype = torch.float32,
    recompute: RecomputeConfig | None = None,
    layers: LayersConfig | None = None,
) -> dict:
    """On one rank: this rank's part of the loss and of the gradients of the global batch."""
    with model_parallel(layout.config) as mesh:
        recompute = recompute or layout.recompute
        models = build_model(eagle, mesh, torch.device("cpu"), dtype, recompute, layers)
        initialize_parameters(models, seed=1)
        batch = in_sequences(global_batch(eagle), layout.packs)
        return forward_backward(models, eagle, mesh, batch)


def run_schedule(wrapped: list, eagle: EagleConfig, mesh: Mesh, batch: list[dict]) -> float:
    """Training's own schedule and loss over `batch`, divided over the data parallel ranks -> this rank's
    part of the loss."""
    per_rank = len(batch) // mesh.dp.size
    mine = batch[mesh.dp.rank * per_rank : (mesh.dp.rank + 1) * per_rank]
    for model in wrapped:
        model.zero_grad_buffer()

    def build(pack: dict) -> ModelInput[Targets]:
        pixels = pack["pixel_values"] if mesh.pp.rank == 0 else None
        inputs = with_targets(pack | {"pixel_values": pixels})
        balance = Balance(pack["filled"], len(batch) * mesh.config.packs)
        return make_input(eagle, mesh, torch.device("cpu"), **inputs, balance=balance)

    return schedule.run_schedule(wrapped, mesh, mine, build, length=len(batch[0]["input_ids"])).item()


def forward_backward(
    models: list[EagleModel], eagle: EagleConfig, mesh: Mesh, batch: list[dict], wrapped: list | None = None
) -> dict:
    """This rank's part of the loss and of the gradients of `batch`; puts on training's wrapper if need be."""
    wrapped = wrapped or wrap_models(models)
    return collect(mesh, models, wrapped, run_schedule(wrapped, eagle, mesh, batch))


def collect(mesh: Mesh, models: list[EagleModel], wrapped: list, loss: float) -> dict:
    """What `combine` takes from a rank that has run forward and backward; `loss` is its part."""
    gather_gradients(mesh, wrapped)
    return {
        "place": (mesh.tp.rank, mesh.expt_tp.rank),
        "loss": loss,
        "gradients": entries(models, lambda parameter: parameter.main_grad),
    }


def entries(
    models: list[EagleModel], value: Callable[[torch.nn.Parameter], torch.Tensor]
) -> list[tuple[str, int | None, torch.Tensor]]:
    """(global name, axis that tensor parallel ranks divide, value) of each trained parameter of a rank."""
    found = []
    for model in models:
        for local_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                sharded = getattr(parameter, "tensor_model_parallel", False)
                dim = parameter.partition_dim if sharded else None
                found.append((global_name(local_name, model), dim, value(parameter).detach().clone()))
    return found


def join_tensor_parallel(shards: list[torch.Tensor], name: str, dim: int) -> torch.Tensor:
    """The full tensor from all ranks' parts; undoes `tensor_parallel_shard`."""
    halves = [shard.chunk(2, dim) if is_gated(name) else (shard,) for shard in shards]
    return torch.cat([torch.cat(parts, dim) for parts in zip(*halves, strict=True)], dim)


def combine(results: list[dict], check_replicas: bool = True) -> Outcome:
    """All ranks' results -> whole tensors; copies of a gradient must be equal wherever they are held."""
    copies: dict[str, dict[int, list[torch.Tensor]]] = {}
    dims: dict[str, int | None] = {}
    for result in results:
        for name, dim, gradient in result["gradients"]:
            dims[name] = dim
            # A tensor that is not sharded has all its copies under one key.
            shard = 0 if dim is None else result["place"][is_expert(name)]
            copies.setdefault(name, {}).setdefault(shard, []).append(gradient)
    gradients = {}
    for name, shards in copies.items():
        for equal in shards.values() if check_replicas else ():
            for other in equal[1:]:
                torch.testing.assert_close(
                    other, equal[0], rtol=1e-5, atol=1e-8, msg=f"{name}: copies differ"
                )
        ordered = [shards[rank][0] for rank in sorted(shards)]
        gradients[name] = (
            ordered[0] if dims[name] is None else join_tensor_parallel(ordered, name, dims[name])
        )
    return Outcome(sum(result["loss"] for result in results), gradients)


_TP2, _TP4 = {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 4}
_SP = {"sequence_parallel": True}
_PP2, _PP4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}
_VPP2 = {"virtual_pipeline_model_parallel_size": 2}
_CP2, _CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
_U2, _U8 = {"ulysses_parallel_size": 2}, {"ulysses_parallel_size": 8}
_RING = {"context_parallel_comm": "ring"}
_PADDED = {"pad_documents": True}
_LATE = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ONE_PROCESS = Layout("one process", 1)


def _with_vision_sharding(name: str, world_size: int, parallel: dict) -> list[Layout]:
    """The layout with every vision sharding that is not another one over a group of size one."""
    modes = ["none"]
    if "context_parallel_size" in parallel:
        modes.append("cp")
    if "tensor_model_parallel_size" in parallel:
        modes.append("cp_tp")
    return [Layout(f"{name}, {mode}", world_size, parallel | {"vision_sharding": mode}) for mode in modes]


LAYOUTS = [
    cell
    for row in [
        ("TP2", 2, _TP2),
        ("TP2+SP", 2, _TP2 | _SP),
        ("TP4+SP", 4, _TP4 | _SP),
        ("PP2", 2, _PP2),
        ("PP2 x VPP2", 2, _PP2 | _VPP2),
        ("PP4", 4, _PP4),
        ("PP4 by letters", 4, _PP4 | {"pipeline_model_parallel_layout": "E|tt|tt|L"}),
        ("PP2 x VPP2 by letters", 2, _PP2 | {"pipeline_model_parallel_layout": "Et|tt|t|L"}),
        ("PP2, own last", 2, _PP2 | {"num_layers_in_last_pipeline_stage": 1, "batch_p2p_sync": True}),
        ("CP2", 2, _CP2),
        ("CP4", 4, _CP4),
        ("DP2", 2, {}),
        ("DP4 overlapped", 4, {"overlap_grad_reduce": True}),  # one rank has no image at all
        ("DP2 overlapped", 2, {"overlap_grad_reduce": True}),
        ("DP2 gathered late", 2, _LATE),
        ("DP2 x PP2 x VPP2 gathered late", 4, _PP2 | _VPP2 | _LATE | {"align_param_gather": True}),
        ("DP2 x CP2 overlapped", 4, _CP2 | {"overlap_grad_reduce": True}),
        ("TP2 x CP2", 4, _TP2 | _CP2),
        ("TP2+SP x CP2", 4, _TP2 | _SP | _CP2),
        ("TP2+SP x PP2 x CP2", 8, _TP2 | _SP | _PP2 | _CP2),
        ("TP2+SP x PP2 x VPP2 x CP2", 8, _TP2 | _SP | _PP2 | _VPP2 | _CP2),
    ]
    for cell in _with_vision_sharding(*row)
]


def _context(name: str, world_size: int, layout: str, parallel: dict) -> Layout:
    return Layout(f"{name}, {layout}", world_size, parallel | {"context_parallel_layout": layout})


LAYOUTS += [
    _context("CP2", 2, "contiguous", _CP2),
    _context("CP2", 2, "zigzag", _CP2),
    _context("CP2", 2, "zigzag_per_document", _CP2),
    _context("CP2 with padded documents", 2, "zigzag_per_document", _CP2 | _PADDED),
    _context("TP2+SP x CP2 with padded documents", 4, "zigzag_per_document", _TP2 | _SP | _CP2 | _PADDED),
    _context("CP4", 4, "balanced", _CP4),
    _context("TP2+SP x CP2", 4, "balanced", _TP2 | _SP | _CP2 | {"vision_sharding": "cp_tp"}),
    _context("PP2 x CP2", 4, "balanced", _PP2 | _CP2),
    _context("Ulysses 2", 2, "balanced", _CP2 | _U2),
    _context("Ulysses 2 x CP2", 4, "balanced", _CP4 | _U2),
    _context("Ulysses 2 x CP2", 4, "zigzag_per_document", _CP4 | _U2),
    _context("TP2+SP x Ulysses 2 x CP2", 8, "balanced", _TP2 | _SP | _CP4 | _U2),
    _context("Ulysses 8 of 4 KV heads", 8, "balanced", {"context_parallel_size": 8} | _U8),
    _context("Ring 2", 2, "zigzag", _CP2 | _RING),
    _context("Ring 4", 4, "balanced", _CP4 | _RING),
    _context("Ring 4", 4, "zigzag_per_document", _CP4 | _RING),
    _context("Ulysses 2 x ring 2", 4, "zigzag", _CP4 | _U2 | {"context_parallel_comm": "a2a+p2p"}),
    _context("TP2+SP x ring 2", 4, "balanced", _TP2 | _SP | _CP2 | _RING),
    _context("PP2 x ring 2", 4, "balanced", _PP2 | _CP2 | _RING),
    _context(
        "Ulysses 2 x gather 2 x ring 2",
        8,
        "balanced",
        {"context_parallel_size": 8, "ring_node_size": 2} | _U2 | _RING,
    ),
]

# Several packs a sequence. At least two microbatches a group; one pack has no picture.
SEQUENCES = [
    Layout(f"{packs} packs a sequence, {name}", world_size, parallel, packs)
    for packs, name, world_size, parallel in [
        (2, "CP1 x DP2", 4, {}),
        (2, "CP2", 4, _CP2),
        (2, "CP1 x PP2", 4, _PP2),
        (2, "Ulysses 2 x ring 2", 4, _CP2 | _U2 | _RING),
        (2, "CP2 x DP2", 8, _CP2),
        (4, "CP2", 8, _CP2),
        (2, "TP2+SP x CP2, cp_tp", 8, _TP2 | _SP | _CP2 | {"vision_sharding": "cp_tp"}),
        (2, "PP2 x CP2", 8, _PP2 | _CP2),
        (2, "PP2 x VPP2 x CP1 x DP2", 8, _PP2 | _VPP2),
    ]
]

_CP4_U4 = {"context_parallel_size": 4, "ulysses_parallel_size": 4}
_MLP = RecomputeConfig("selective", recompute_modules=("core_attn", "mlp"))
_SEVEN_FOR_EACH = {"num_key_value_heads": 2, "num_attention_heads": 14, "hidden_size": 14 * 8}

# What is no layout: Megatron's other options, and other heads. fp32 gradients are summed in fp32 either way.
VARIANTS = [
    Layout("TP2+SP, MLP computed again", 2, _TP2 | _SP, recompute=_MLP),
    Layout(
        "PP2 x VPP2 by letters, MLP computed again",
        2,
        _PP2 | {"pipeline_model_parallel_layout": "Et|tt|t|L"},
        recompute=_MLP,
    ),
    Layout(
        "DP2 x CP2 gathered late, sums in the type of the parameters",
        4,
        _CP2 | _LATE | {"grad_reduce_in_fp32": False},
    ),
    # Two ranks have each KV head. Of seven query heads one has four and the other three.
    Layout("Ulysses 4 of 8 query and 2 KV heads", 4, _CP4_U4, text={"num_key_value_heads": 2}),
    Layout("Ulysses 4 of 14 query and 2 KV heads", 4, _CP4_U4, text=_SEVEN_FOR_EACH),
]

# Eight experts of which a token has two; an auxiliary loss whose gradients are as large as the others.
EXPERTS = {
    "model_type": "qwen3_moe",
    "experts": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 1.0,
    },
}
_EP2, _EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
_WHOLE = {"expert_tensor_parallel_size": 1}
EXPERT_LAYOUTS = [
    Layout(name, world_size, parallel, packs, text=EXPERTS)
    for name, world_size, packs, parallel in [
        ("EP2 x TP2+SP", 2, 1, _EP2 | _TP2 | _SP | _WHOLE),
        ("EP2 x TP2+SP, divided experts", 4, 1, _EP2 | _TP2 | _SP),
        ("TP2+SP, whole experts", 2, 1, _TP2 | _SP | _WHOLE),
        ("TP2+SP, divided experts", 2, 1, _TP2 | _SP),
        ("EP2 x CP2", 2, 1, _EP2 | _CP2),
        ("EP2 x ring 2", 2, 1, _EP2 | _CP2 | _RING),
        ("PP2 x EP2", 4, 1, _PP2 | _EP2),
        ("PP2 x VPP2 x EP2", 4, 1, _PP2 | _VPP2 | _EP2),
        ("DP2 x EP2", 4, 1, _EP2),
        ("DP2 x EP2 gathered late", 4, 1, _EP2 | _LATE),
        ("EP4", 4, 1, _EP4),
        ("EP4 x TP2+SP x CP2, cp_tp", 4, 1, _EP4 | _TP2 | _SP | _CP2 | _WHOLE | {"vision_sharding": "cp_tp"}),
        ("2 packs a sequence, EP2 x CP2", 4, 2, _EP2 | _CP2),
        ("EP2 x TP2+SP x PP2 x CP2", 8, 1, _EP2 | _TP2 | _SP | _PP2 | _CP2),
    ]
]

# Language models besides `tiny_model`'s, by their settings. Heads of Qwen3 are wider than hidden / heads, and
# YaRN stretches lengths of which the packs' documents are on both sides.
_YARN = {"rope_scaling": YarnConfig(4.0, 16), "max_position_embeddings": 64}
LANGUAGE_MODELS: dict[str, dict] = {
    "qwen2 with YaRN": _YARN,
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    # As Qwen3-30B-A3B; transformers adds no auxiliary loss to a loss of labels.
    "qwen3_moe": {
        **EXPERTS,
        "head_dim": 24,
        "experts": {**EXPERTS["experts"], "router_aux_loss_coef": 0.0},
    },
    "qwen3 with YaRN, tied": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True, **_YARN},
}
FAMILIES = [
    Layout(f"{name}, {family}", world_size, parallel, text=text)
    for family, text in LANGUAGE_MODELS.items()
    for name, world_size, parallel in (
        ("one process", 1, {}),
        ("TP2", 2, _TP2),
        ("TP2+SP", 2, _TP2 | _SP),
        ("PP2", 2, _PP2),
        ("CP2", 2, _CP2),
    )
    if name != "TP2" or "experts" not in text  # every token would be sent twice: refused, in Megatron too
]
_DIVIDED = [layout for layout in FAMILIES if layout.world_size > 1]
TABLE = (*LAYOUTS, *SEQUENCES, *VARIANTS, *EXPERT_LAYOUTS, *_DIVIDED)


def cell(name: str) -> Layout:
    """The layout of the table with this name, or the one process."""
    return next(layout for layout in (*TABLE, ONE_PROCESS) if layout.name == name)

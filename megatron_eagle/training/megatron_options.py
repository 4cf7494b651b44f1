"""Megatron's own options, by its names: what each needs, and what it does not go with.

What is not refused reaches Megatron as it is. What a library has to bring for it is looked for where a run
starts (`model.layers.choose_layers`, `optimizer.check_fused_adam`).
"""

from megatron_eagle.errors import UserError
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.optimizer import OptimizerConfig

_NO_EXPERTS = "the model has no experts"
# What Megatron can compute again that no model here has, or not so.
_NOT_RECOMPUTED = {
    "layernorm": "Megatron computes norms again only with Transformer Engine's",
    "moe_act": "Megatron computes it again only in Transformer Engine's experts; moe has it",
    "shared_experts": "the model has no shared experts",
    "mla_up_proj": "the model has no latent attention",
}


def check_megatron_options(
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    layers: LayersConfig,
    optimizer: OptimizerConfig,
    precision: str,
    rows: int,
    experts: bool,
) -> None:
    """
    Args:
        rows: of the hidden states between layers of a rank.
        experts: whether the language model has them in place of MLPs.
    Raises:
        UserError: an option without what it needs, or beside what it does not go with.
    """
    problem = (
        _of_gathering(parallel, layers)
        or _of_stages(parallel)
        or _of_recompute(recompute, experts)
        or _of_layers(parallel, recompute, layers, precision, rows)
        or _of_experts(parallel, layers, optimizer, experts)
        or _of_optimizer(optimizer, precision)
    )
    if problem is not None:
        raise UserError(problem)


def _of_gathering(parallel: ParallelConfig, layers: LayersConfig) -> str | None:
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        return (
            "parallel.overlap_param_gather needs overlap_grad_reduce, as Megatron cuts buckets for both: set "
            "that to true"
        )
    if parallel.align_param_gather and not (parallel.overlap_param_gather and parallel.num_model_chunks > 1):
        return (
            "parallel.align_param_gather needs overlap_param_gather and virtual pipeline stages: without "
            "them nothing is gathered ahead; set it to false"
        )
    if layers.loss_into_main_grad and not parallel.grad_reduce_in_fp32:
        return (
            "layers.loss_into_main_grad adds in fp32 and parallel.grad_reduce_in_fp32 is false: leave one out"
        )
    return None


def _of_stages(parallel: ParallelConfig) -> str | None:
    if not parallel.batch_p2p_sync:
        return None
    if parallel.pipeline_model_parallel_size == 1 or parallel.num_model_chunks > 1:
        return (
            "parallel.batch_p2p_sync waits for messages between stages that are sent in batches: there are "
            "none without stages, nor with virtual ones; leave it out"
        )
    return None


def _of_recompute(recompute: RecomputeConfig, experts: bool) -> str | None:
    modules, mlp = recompute.recompute_modules, "moe" if experts else "mlp"
    choose = f"choose core_attn or {mlp}"
    missing = {"mlp": "the model has experts in place of MLPs"} if experts else {"moe": _NO_EXPERTS}
    if modules and recompute.language != "selective":
        return (
            f"recompute.recompute_modules says what selective computes again, and recompute.language is "
            f"{recompute.language}: set it to selective, or leave the modules out"
        )
    for name in modules:
        if why := (_NOT_RECOMPUTED | missing).get(name):
            return f"recompute.recompute_modules {name}: {why}; {choose}"
        if name not in ("core_attn", mlp):
            return f"recompute.recompute_modules: there is no {name!r}; {choose}"
    if experts and recompute.swiglu:
        return (
            "recompute.swiglu is of an MLP, and the model has experts: choose recompute.language selective "
            "with recompute_modules [moe], or leave it out"
        )
    if "mlp" in modules and recompute.swiglu:
        return "recompute.swiglu is part of recompute.recompute_modules mlp: leave one out"
    return None


def _of_layers(
    parallel: ParallelConfig, recompute: RecomputeConfig, layers: LayersConfig, precision: str, rows: int
) -> str | None:
    if layers.cuda_graph_impl != "none":
        return (
            f"layers.cuda_graph_impl {layers.cuda_graph_impl}: a graph repeats the numbers of its first "
            "step, and every pack has documents and tiles of its own; set it to none"
        )
    if layers.gradient_accumulation_fusion and not parallel.grad_reduce_in_fp32:
        return (
            "layers.gradient_accumulation_fusion adds in fp32 and parallel.grad_reduce_in_fp32 is false: "
            "leave one out"
        )
    if parallel.tp_comm_overlap:
        if not parallel.sequence_parallel:
            return "parallel.tp_comm_overlap overlaps what sequence_parallel sends: set that to true"
        if layers.linear == "local":
            return "parallel.tp_comm_overlap is Transformer Engine's: set layers.linear to transformer_engine"
    if layers.fp8 is None:
        return None
    if layers.linear == "local":
        return "layers.fp8 is Transformer Engine's: set layers.linear to transformer_engine"
    if precision != "bf16":
        return f"layers.fp8 needs training.precision bf16, and it is {precision}"
    if recompute.language == "offload":
        return (
            "layers.fp8 does not go with recompute.language offload, which computes layers again outside of "
            "Transformer Engine's scales: choose selective or full"
        )
    if parallel.pad_documents or rows % 16:
        number = "numbers that vary with pad_documents" if parallel.pad_documents else f"{rows} of a pack"
        return f"layers.fp8 takes rows in multiples of 16 and a rank has {number}: choose another layout"
    return None


def _of_experts(
    parallel: ParallelConfig, layers: LayersConfig, optimizer: OptimizerConfig, experts: bool
) -> str | None:
    if not experts:
        if optimizer.freeze_router:
            return f"optimizer.freeze_router: {_NO_EXPERTS}; leave it out"
        if layers.moe_token_dispatcher_type != "alltoall":
            return f"layers.moe_token_dispatcher_type: {_NO_EXPERTS}; leave it out"
        return None
    if layers.fp8 is not None:
        return "layers.fp8: products in 8 bits are not built for experts; leave it out"
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    if layers.moe_token_dispatcher_type == "flex" and ranks == 1:
        return (
            "layers.moe_token_dispatcher_type flex is for experts that ranks divide, and each rank has them "
            "all: choose alltoall"
        )
    return None


def _of_optimizer(optimizer: OptimizerConfig, precision: str) -> str | None:
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(optimizer, name) and precision != "bf16":
            return f"optimizer.{name} needs training.precision bf16, and it is {precision}"
    return None

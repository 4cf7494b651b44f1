"""Adam through Megatron's distributed optimizer, and the learning-rate schedule."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_eagle.context_parallel.vision_sharding import sum_encoder_gradients
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import PARTS
from megatron_eagle.model.parts import check_parts, mask_old_token_rows, optimizer_overrides
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.libraries import why_not_library
from megatron_eagle.runtime.megatron_cpu import (
    fix_torch_adam_in_distributed_optimizer,
    use_norm_without_waiting,
)


@dataclass
class OptimizerConfig(Ranged):
    """AdamW and its schedule; the defaults are Eagle 2.5's (lr 2e-5 cosine, 3 % warm-up, decay 0.05, clip 1).

    The learning rate rises linearly from 0 over the warm-up and then follows `lr_decay_style` down to
    `min_lr` at `training.train_iterations`: `cosine`; `constant` (no decay); `wsd`, which stays at `lr` and
    falls linearly over the last `lr_wsd_decay_fraction` of the iterations.
    Weight decay leaves out biases and every other vector (norm weights), as Megatron does.
    """

    lr: Annotated[float, Range(0, 1)] = 2e-5
    min_lr: Annotated[float, Range(0, 1)] = 0.0
    lr_decay_style: Literal["cosine", "constant", "wsd"] = "cosine"
    # Of train_iterations, where lr_warmup_iterations is null.
    lr_warmup_fraction: Annotated[float, Range(0, 1)] = 0.03
    lr_warmup_iterations: Annotated[int, Range(0, 10**9)] | None = None  # or so many
    lr_wsd_decay_fraction: Annotated[float, Range(0, 1)] = 0.1  # of train_iterations
    weight_decay: Annotated[float, Range(0, 1)] = 0.05  # decoupled, as in AdamW
    # Adam computes in fp32: a beta nearer to 1 would be 1, and with an eps nearer to 0 a gradient so small
    # that its square is 0 would be divided by next to nothing.
    adam_beta1: Annotated[float, Range(0, 0.999999)] = 0.9
    adam_beta2: Annotated[float, Range(0, 0.999999)] = 0.999  # of the squares
    adam_eps: Annotated[float, Range(1e-20, 1)] = 1e-8  # added to the root of the squares
    # L2 norm over all parameters; 0 switches clipping off.
    clip_grad: Annotated[float, Range(1e-3, 1e9, or_zero=True)] = 1.0
    # Transformer Engine's Adam keeps of the fp32 main parameters only what bf16 ones lack, 2 bytes for 4.
    use_precision_aware_optimizer: bool = False
    # Megatron's hybrid Adam: states and work are the host's.
    optimizer_cpu_offload: bool = False
    # Of them, so much.
    optimizer_offload_fraction: Annotated[float, Range(0, 1)] = 1.0
    # Parts with gradients, of vision, connector, language; new_token_rows in place of language trains the
    # embedding and output rows from first_new_token on.
    trainable: tuple[str, ...] = PARTS
    # The routers of experts stay as they are, and have no auxiliary loss.
    freeze_router: bool = False
    # By part: scales its lr and min_lr.
    lr_multipliers: dict[str, Annotated[float, Range(0, 1000)]] = field(default_factory=dict)
    # With new_token_rows: the first trained row of the embedding and of the output layer.
    first_new_token: Annotated[int, Range(0, 2**24)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr:g}: must be at most lr {self.lr:g}")
        check_parts(self.trainable, self.lr_multipliers, self.first_new_token, self.freeze_router)

    @property
    def needs_fused_adam(self) -> bool:
        """Megatron's hybrid Adam, too, takes gradients as the precision aware one does."""
        return self.use_precision_aware_optimizer or self.optimizer_cpu_offload

    def warmup_iterations(self, train_iterations: int) -> int:
        """Iterations of linear warm-up in a run of `train_iterations`."""
        if self.lr_warmup_iterations is not None:
            return self.lr_warmup_iterations
        return int(self.lr_warmup_fraction * train_iterations)


def check_fused_adam(config: OptimizerConfig) -> None:
    """
    Raises:
        UserError: an option is asked for that only Transformer Engine's Adam has, and it is not here.
    """
    missing = why_not_library("transformer_engine.pytorch.optimizers") if config.needs_fused_adam else None
    if missing:
        name = "optimizer_cpu_offload" if config.optimizer_cpu_offload else "use_precision_aware_optimizer"
        raise UserError(f"optimizer.{name} needs Transformer Engine's Adam: {missing}; leave it out")


def wrap_models(
    models: Sequence[MegatronModule], *, across_replicas: bool = True
) -> list[DistributedDataParallel]:
    """Megatron's data-parallel wrapper around each model chunk.

    Gradients accumulate in fp32 and are summed, never averaged, over data and context parallel ranks, each
    of which then has its optimizer's shard; with `parallel.overlap_grad_reduce` while the last microbatch's
    backward still runs. Without `across_replicas` each data parallel rank is by itself: gradients are those
    of its own microbatches, whole on each of its context parallel ranks. With `parallel.overlap_param_gather`
    updated parameters are gathered in front of the modules that use them.
    bf16 models are built in bf16 and need no `Float16Module`: it would also round the buffers that must
    stay fp32 (rotary frequencies).
    """
    mesh = models[0].mesh
    overlap = mesh.config.overlap_grad_reduce and across_replicas
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=mesh.config.grad_reduce_in_fp32,
        use_distributed_optimizer=across_replicas,
        overlap_grad_reduce=overlap,
        overlap_param_gather=mesh.config.overlap_param_gather and across_replicas,
        align_param_gather=mesh.config.align_param_gather and across_replicas,
    )
    groups = None  # all data parallel ranks
    if not across_replicas:
        groups = copy.copy(mesh.groups)
        groups.dp, groups.dp_cp = mesh.alone, mesh.cp.group
        # Of a replica, those that have the same experts; `replay` leaves expert parallelism out.
        groups.expt_dp = mesh.cp.group if mesh.expt_tp.size == mesh.tp.size else mesh.groups.tp_cp
    wrapped = [DistributedDataParallel(model.config, config, model, pg_collection=groups) for model in models]
    schedule = models[0].config  # the one that Megatron's schedules read
    schedule.finalize_model_grads_func = _finalize_model_grads
    if overlap:
        # Without it, every microbatch would start the reduction, not only the last.
        no_sync = [model.no_sync for model in wrapped]
        schedule.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if config.align_param_gather:
        schedule.param_sync_func = [model.start_param_sync for model in wrapped]
    return wrapped


def gather_parameters(models: Sequence[DistributedDataParallel]) -> None:
    """Bring every rank's parameters up to date, where `parallel.overlap_param_gather` has left that to the
    next forward and they are read without one. Collective."""
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


def _finalize_model_grads(
    models: list[DistributedDataParallel],
    num_tokens: Tensor | None,  # noqa: ARG001
    **kwargs: Any,
) -> None:
    # Megatron would divide by its token count, an int32 that cannot hold the loss normaliser. The token
    # weights carry the division already.
    finalize_model_grads(models, None, **kwargs)
    # An encoder that tensor parallel ranks hold whole has seen other tiles on each of them.
    sum_encoder_gradients(_encoder_gradients(models), models[0].tp_group)
    mask_old_token_rows(models)


def _encoder_gradients(models: Sequence[DistributedDataParallel]) -> Iterator[Tensor]:
    """Of encoders that tensor parallel ranks hold whole: the part of each gradient that this rank's optimizer
    reads, flat; the same parts on all tensor parallel ranks."""
    for model in models:
        for buffer in model.buffers:
            for bucket in buffer.buckets:
                start, end = 0, bucket.grad_data.numel()
                if model.ddp_config.use_distributed_optimizer:  # the rest was summed elsewhere
                    share = end // buffer.data_parallel_group.size()
                    start = share * buffer.data_parallel_group.rank()
                    end = start + share
                for parameter in bucket.params_list:
                    if getattr(parameter, "sum_over_tensor_parallel", False):
                        gradient = parameter.main_grad.view(-1)
                        offset = gradient.storage_offset() - bucket.grad_data.storage_offset()
                        first = max(start - offset, 0)
                        if (part := gradient[first : max(end - offset, first)]).numel():
                            yield part


def build_optimizer(config: OptimizerConfig, models: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over wrapped model chunks: state and fp32 main parameters sharded over data and context parallel.

    Copies the fp32 main parameters from the models: load weights before, or `reload_model_params()` after.
    """
    fix_torch_adam_in_distributed_optimizer()
    use_norm_without_waiting()
    model_config = models[0].config
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=config.needs_fused_adam,
        optimizer_cpu_offload=config.optimizer_cpu_offload,
        optimizer_offload_fraction=config.optimizer_offload_fraction if config.optimizer_cpu_offload else 0.0,
        bf16=model_config.bf16,
        params_dtype=torch.bfloat16 if model_config.bf16 else torch.float32,
    )
    overrides = get_standard_config_overrides(megatron_config)
    overrides |= optimizer_overrides(config.lr_multipliers, config.lr, config.min_lr)
    return get_megatron_optimizer(megatron_config, list(models), overrides, use_gloo_process_groups=False)


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, train_iterations: int
) -> OptimizerParamScheduler:
    """Learning rate as a function of finished iterations; call `.step(1)` after each.

    Loading a checkpoint into it moves it to that iteration; its shape stays this run's configuration.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_iterations(train_iterations),
        lr_decay_steps=train_iterations,
        lr_decay_style="WSD" if config.lr_decay_style == "wsd" else config.lr_decay_style,
        wsd_decay_steps=max(1, round(config.lr_wsd_decay_fraction * train_iterations)),
        lr_wsd_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iterations,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )

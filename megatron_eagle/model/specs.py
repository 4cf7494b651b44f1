"""Megatron-Core configurations and layer specifications of the three parts of Eagle 2.5.

The vision encoder and the connector have their own configurations: one pipeline stage, no context or
sequence parallelism. They are tensor parallel like the language model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from eagle_kernels.activation_offload import HostStore
from megatron_eagle.context_parallel.backends import choose_attention
from megatron_eagle.model.experts import LanguageLayer, expert_options, experts_module
from megatron_eagle.model.layers import LayerClasses, ProductFreeMLP, mlp_module
from megatron_eagle.model.offload import offloaded_specs
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.rotary import RotaryAttention
from megatron_eagle.model.shapes import LocalShapes
from megatron_eagle.model.text import TextConfig
from megatron_eagle.model.vision_attention import BidirectionalAttention
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig


@dataclass
class RecomputeConfig(Ranged):
    """Activations that backward computes again instead of keeping them.

    `selective` keeps everything but core attention's (Megatron's default choice); `full` keeps only each
    layer's input; `offload` keeps that and the attention's output in host memory and computes everything but
    attention again (`eagle_kernels.activation_offload`), save for the last `offload_keep_last` layers of each
    model chunk, whose backward comes first: theirs stay on the device. The encoder has no selective form: its
    attention keeps no score matrix.

    `recompute_modules`: what `selective` computes again, of core_attn and mlp; empty: core_attn.

    `swiglu`: the MLP's product silu(gate) * up is computed again in backward instead of kept, beside any
    policy (under `full` and `offload` it matters in the layer under way alone).
    """

    language: Literal["none", "selective", "full", "offload"] = "none"  # of the language model
    vision: Literal["none", "full"] = "none"  # of the vision encoder
    offload_keep_last: Annotated[int, Range(0, 1024)] = 2
    recompute_modules: tuple[str, ...] = ()
    swiglu: bool = False


# Megatron's words for the policies of `RecomputeConfig`; offload is not one of its own.
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "offload": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def _leave_unset(weight: Tensor) -> Tensor:
    return weight


def _common(tensor_model_parallel_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor_model_parallel_size,
        # Parameters get their values from model/initialization.py or from a checkpoint. Not through
        # perform_initialization=False: Megatron would then leave out the tensor parallel attributes,
        # without which its gradient norm counts shards wrongly.
        "init_method": _leave_unset,
        "output_layer_init_method": _leave_unset,
        "embedding_init_method": _leave_unset,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }


def language_config(
    eagle: EagleConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    recompute: RecomputeConfig,
    options: Mapping[str, Any],
) -> TransformerConfig:
    """The language model under the whole layout. `options` are Megatron's, of `LayerClasses`."""
    text = eagle.text
    interleaved = parallel.num_model_chunks > 1
    on_gpu = torch.cuda.is_available()
    again = _RECOMPUTE[recompute.language]
    experts = {} if text.experts is None else expert_options(text.experts, parallel)
    if recompute.recompute_modules:
        again = again | {"recompute_modules": list(recompute.recompute_modules)}
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        # Megatron's word for an activation module of the specification on the packed gate|up.
        use_te_activation_func=True,
        add_bias_linear=False,
        add_qkv_bias=text.family.qkv_bias,
        # With it Megatron sums the gradients of these norms over tensor parallel ranks, whose heads differ.
        qk_layernorm=text.family.qk_norm,
        pipeline_dtype=dtype,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        context_parallel_size=parallel.context_parallel_size,
        hierarchical_context_parallel_sizes=parallel.hierarchical_context_parallel_sizes,
        sequence_parallel=parallel.sequence_parallel,
        # The loss is a plain sum: the token weights are already divided by the global normaliser.
        calculate_per_token_loss=True,
        # With interleaving and gloo, batched point-to-point gives wrong gradients and freed outputs
        # are sent late; both silently.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=parallel.batch_p2p_sync,
        deallocate_pipeline_outputs=on_gpu,
        tp_comm_overlap=parallel.tp_comm_overlap,
        **again,
        **{"ffn_hidden_size": text.intermediate_size} | experts,
        **_common(parallel.tensor_model_parallel_size, dtype) | {**options},
    )


def vision_config(
    eagle: EagleConfig, parallel: ParallelConfig, dtype: torch.dtype, recompute: RecomputeConfig
) -> TransformerConfig:
    """SigLIP2: LayerNorm, tanh GELU, biases everywhere."""
    vision = eagle.vision
    return TransformerConfig(
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.layer_norm_eps,
        activation_func=partial(F.gelu, approximate="tanh"),
        **_RECOMPUTE[recompute.vision],
        **_common(LocalShapes(eagle, parallel).vision_ranks, dtype),
    )


def connector_config(eagle: EagleConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """The connector's linear layers; only sizes and types are read from it."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=eagle.text.hidden_size,
        num_attention_heads=eagle.text.num_attention_heads,
        **_common(LocalShapes(eagle, parallel).vision_ranks, dtype),
    )


def _layer(
    classes: LayerClasses,
    norm: Callable[..., Any] | ModuleSpec,
    core_attention: ModuleSpec | type[MegatronModule],
    mask: AttnMaskType,
    mlp: type[MegatronModule],
    module: type[TransformerLayer] = TransformerLayer,
    head_norm: Callable[..., Any] | ModuleSpec = IdentityOp,
) -> ModuleSpec:
    column, row = classes.column_parallel_linear, classes.row_parallel_linear
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=core_attention,
            linear_proj=row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp(
    classes: LayerClasses, group: ProcessGroup, kind: type[MLP] = MLP, activation: ModuleSpec | None = None
) -> type[MLP]:
    linear_fc1, linear_fc2 = classes.column_parallel_linear, classes.row_parallel_linear
    # By name: versions of Megatron-Core have them in different orders.
    parts = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2, activation_func=activation)
    return mlp_module(kind, parts, group)


def language_block(
    text: TextConfig,
    config: TransformerConfig,
    classes: LayerClasses,
    chunk: int | None,
    mesh: Mesh,
    recompute: RecomputeConfig,
    store: HostStore,
) -> TransformerBlockSubmodules:
    """The language layers of virtual pipeline stage `chunk` (None without interleaving).

    `store` is this rank's, for the tensors of offloaded layers.
    """
    attention = choose_attention(classes.attention, config.params_dtype, config.kv_channels)
    own = {"attention": attention, "ring": mesh.ring, "kernels": classes.kernels}
    core = ModuleSpec(module=RotaryAttention, params=own)
    mlp: type[MegatronModule]
    if text.experts is None:
        kind = ProductFreeMLP if recompute.swiglu else MLP
        mlp = _mlp(classes, mesh.tp.group, kind, classes.swiglu)
    else:
        mlp = experts_module(text.experts, classes, mesh)
    norm = classes.rms_norm
    head_norm = norm if config.qk_layernorm else IdentityOp
    layer = _layer(classes, norm, core, AttnMaskType.causal, mlp, LanguageLayer, head_norm)
    layers = [layer] * get_num_layers_to_build(config, chunk)
    if recompute.language == "offload":
        in_flight = mesh.config.forwards_in_flight(mesh.pp.rank)
        layers = offloaded_specs(layers, store, recompute.offload_keep_last, in_flight)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=classes.rms_norm)


def vision_block(
    config: TransformerConfig, classes: LayerClasses, group: ProcessGroup
) -> TransformerBlockSubmodules:
    """All layers of the vision encoder, over its tensor parallel `group`."""
    mlp = _mlp(classes, group)
    layer = _layer(classes, classes.layer_norm, BidirectionalAttention, AttnMaskType.no_mask, mlp)
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=classes.layer_norm)

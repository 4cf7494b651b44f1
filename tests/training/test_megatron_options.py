"""Megatron's options by its names: taken or refused with a reason; what is taken reaches Megatron."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.model import layers
from megatron_eagle.model.layers import LayersConfig, choose_layers
from megatron_eagle.model.specs import RecomputeConfig, language_config
from megatron_eagle.runtime import tp_overlap
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training import optimizer
from megatron_eagle.training.megatron_options import check_megatron_options
from megatron_eagle.training.optimizer import OptimizerConfig, check_fused_adam
from megatron_eagle.training.run_config import load_run_config
from tests.parallel.cases import tiny_model
from tests.training.test_training_loop import write_run

OVERLAP = "parallel.overlap_grad_reduce=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
SP = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
BF16 = "training.precision=bf16"


def load(tmp_path, overrides, world_size=4):
    write_run(tmp_path)
    return load_run_config(tmp_path / "run.yaml", overrides, world_size=world_size)


@pytest.mark.parametrize(
    "overrides",
    [
        [OVERLAP, "parallel.overlap_param_gather=true"],
        [OVERLAP, PP2, VPP2, "parallel.overlap_param_gather=true", "parallel.align_param_gather=true"],
        ["parallel.grad_reduce_in_fp32=false"],
        ["recompute={language: selective, recompute_modules: [mlp]}"],
        [PP2, "parallel.pipeline_model_parallel_layout=Et|tttL"],
        [PP2, "parallel.num_layers_in_last_pipeline_stage=1"],
        [PP2, "parallel.batch_p2p_sync=true"],
        [BF16, "optimizer.use_precision_aware_optimizer=true"],
        [BF16, "optimizer={optimizer_cpu_offload: true, optimizer_offload_fraction: 0.5}"],
        [BF16, "layers={fp8: hybrid, fp8_recipe: blockwise}"],
        ["layers.gradient_accumulation_fusion=true"],
        [*SP, "parallel.tp_comm_overlap=true"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_taken(overrides, tmp_path):
    load(tmp_path, overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["parallel.overlap_param_gather=true"], "overlap_param_gather needs overlap_grad_reduce"),
        (
            [OVERLAP, "parallel.overlap_param_gather=true", "parallel.align_param_gather=true"],
            "align_param_gather needs overlap_param_gather and virtual pipeline stages",
        ),
        (
            ["layers={loss: fused, loss_into_main_grad: true}", "parallel.grad_reduce_in_fp32=false"],
            "loss_into_main_grad adds in fp32 and parallel.grad_reduce_in_fp32 is false",
        ),
        (["parallel.batch_p2p_sync=true"], "there are none without stages, nor with virtual ones"),
        ([PP2, VPP2, "parallel.batch_p2p_sync=true"], "there are none without stages, nor with virtual ones"),
        (["recompute.recompute_modules=[mlp]"], "recompute.language is none: set it to selective"),
        (
            ["recompute={language: selective, recompute_modules: [layernorm]}"],
            "layernorm: Megatron computes norms again only with Transformer Engine's; choose core_attn",
        ),
        (["recompute={language: selective, recompute_modules: [moe]}"], "moe: the model has no experts"),
        (["recompute={language: selective, recompute_modules: [mpl]}"], "there is no 'mpl'"),
        (
            ["recompute={language: selective, swiglu: true, recompute_modules: [mlp]}"],
            "recompute.swiglu is part of recompute.recompute_modules mlp",
        ),
        (["layers.cuda_graph_impl=local"], "every pack has documents and tiles of its own; set it to none"),
        (
            ["layers.gradient_accumulation_fusion=true", "parallel.grad_reduce_in_fp32=false"],
            "gradient_accumulation_fusion adds in fp32",
        ),
        (["parallel.tp_comm_overlap=true"], "overlaps what sequence_parallel sends: set that to true"),
        (
            [*SP, "parallel.tp_comm_overlap=true", "layers.linear=local"],
            "tp_comm_overlap is Transformer Engine's: set layers.linear to transformer_engine",
        ),
        (["layers.fp8=hybrid"], "layers.fp8 needs training.precision bf16, and it is fp32"),
        ([BF16, "layers={fp8: hybrid, linear: local}"], "layers.fp8 is Transformer Engine's"),
        (
            [BF16, "layers.fp8=e4m3", "recompute.language=offload"],
            "does not go with recompute.language offload",
        ),
        (
            ["optimizer.use_precision_aware_optimizer=true"],
            "use_precision_aware_optimizer needs training.precis",
        ),
        (["optimizer.optimizer_cpu_offload=true"], "optimizer_cpu_offload needs training.precision bf16"),
    ],
)
def test_refused_with_its_reason(overrides, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as refused:
        load(tmp_path, overrides)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "padded", "number"),
    [(24, False, "24 of a pack"), (32, True, "numbers that vary with pad_documents")],
)
def test_rows_that_eight_bits_do_not_take(rows, padded, number):
    parallel, config = ParallelConfig(pad_documents=padded), LayersConfig(fp8="e4m3")
    with pytest.raises(UserError, match=f"takes rows in multiples of 16 and a rank has {number}"):
        check_megatron_options(parallel, RecomputeConfig(), config, OptimizerConfig(), "bf16", rows, False)
    check_megatron_options(ParallelConfig(), RecomputeConfig(), config, OptimizerConfig(), "bf16", 32, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_what_a_library_has_to_bring_is_asked_for_at_the_start():
    eagle, one = tiny_model(), ParallelConfig()
    for config, parallel, reason in (
        (
            LayersConfig(gradient_accumulation_fusion=True),
            one,
            "there is no CUDA device; it is built with Apex",
        ),
        (
            LayersConfig(fp8="hybrid"),
            one,
            "layers.fp8 hybrid, delayed: it needs Transformer Engine; leave it",
        ),
        (
            LayersConfig(),
            ParallelConfig(2, sequence_parallel=True, tp_comm_overlap=True),
            "tp_comm_overlap needs Transformer Engine's linear layers",
        ),
    ):
        with pytest.raises(UserError, match=reason):
            choose_layers(config, eagle, parallel)
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        with pytest.raises(
            UserError, match=f"optimizer.{name} needs Transformer Engine's Adam: there is no CU"
        ):
            check_fused_adam(OptimizerConfig(**{name: True}))
    check_fused_adam(OptimizerConfig())


@pytest.fixture
def engine(monkeypatch):
    """Transformer Engine's functions, with the signatures of 2.17, and Apex' extension."""
    monkeypatch.setattr(layers, "why_not_library", lambda module: None)
    monkeypatch.setattr(optimizer, "why_not_library", lambda module: None)
    quantization = ModuleType("transformer_engine.pytorch.quantization")
    quantization.check_fp8_support = lambda: (True, "")
    quantization.check_fp8_block_scaling_support = lambda: (False, "it needs Hopper")
    monkeypatch.setitem(sys.modules, quantization.__name__, quantization)


def test_what_is_taken_reaches_megatron(engine):
    """Through Megatron's own validation of its configuration."""
    eagle, parallel = tiny_model(), ParallelConfig(2, sequence_parallel=True, tp_comm_overlap=True)
    config = LayersConfig("transformer_engine", fp8="hybrid", gradient_accumulation_fusion=True)
    classes = choose_layers(config, eagle, parallel)
    recompute = RecomputeConfig("selective", recompute_modules=("mlp",))
    found = language_config(eagle, parallel, torch.bfloat16, recompute, classes.options)
    assert (found.fp8, found.fp8_recipe) == ("hybrid", "delayed")
    assert found.gradient_accumulation_fusion and found.tp_comm_overlap
    assert found.recompute_modules == ["mlp"]
    with pytest.raises(UserError, match="layers.fp8 e4m3, blockwise: it needs Hopper; leave it out"):
        choose_layers(LayersConfig("transformer_engine", fp8="e4m3", fp8_recipe="blockwise"), eagle, parallel)
    with pytest.raises(UserError, match="this Transformer Engine has no check_mxfp8_support"):
        choose_layers(LayersConfig("transformer_engine", fp8="e4m3", fp8_recipe="mxfp8"), eagle, parallel)
    check_fused_adam(OptimizerConfig(use_precision_aware_optimizer=True))


def _since_2_7(shape, tp_size, use_fp8=False, quantization_modes=None, dtype=torch.bfloat16, ub_cfgs=None):
    return shape, tp_size, quantization_modes


def _before(shape, tp_size, use_fp8=False, dtype=torch.bfloat16, ub_cfgs=None):
    return shape, tp_size, use_fp8


def _other(shape, tp_group, use_fp8=False):
    raise AssertionError("called with what it does not take")


def test_the_buffers_of_every_release(monkeypatch):
    """Of Transformer Engine's releases, by their signatures; destroyed at the end."""
    called = []
    modes = SimpleNamespace(FP8="fp8", NONE="none")
    base = ModuleType("transformer_engine.pytorch.module.base")
    base.UserBufferQuantizationMode, base.destroy_ub = modes, lambda: called.append("destroyed")
    monkeypatch.setitem(sys.modules, base.__name__, base)
    for function, last in ((_since_2_7, ["fp8"]), (_before, True)):
        base.initialize_ub = function
        arguments = tp_overlap.buffer_arguments(base, 128, 64, 2, fp8=True)
        assert function(**arguments) == ([128, 64], 2, last)
    with tp_overlap.tensor_parallel_buffers(True, 128, 64, 2, fp8=False):
        assert called == []
    assert called == ["destroyed"]
    base.initialize_ub = _other
    with (
        pytest.raises(UserError, match="initialize_ub takes no tp_size"),
        tp_overlap.tensor_parallel_buffers(True, 128, 64, 2, fp8=False),
    ):
        pass
    with tp_overlap.tensor_parallel_buffers(False, 128, 64, 2, fp8=False):
        pass

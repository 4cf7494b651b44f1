"""Optional libraries are found by importing them, and refused in one line where they are missing."""

import inspect

import pytest
import torch

from eagle_kernels import linear_cross_entropy
from megatron_eagle.errors import UserError
from megatron_eagle.model import layers
from megatron_eagle.model.layers import LayersConfig, check_layers, choose_layers
from megatron_eagle.runtime.parallel import ParallelConfig
from tests.parallel.cases import tiny_model

EAGLE, ONE = tiny_model(), ParallelConfig()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_gpu():
    classes = choose_layers(LayersConfig(), EAGLE, ONE)
    assert classes.rms_norm.module is layers.RMSNorm and classes.fused_loss is None
    assert "no CUDA device" in classes.reason
    assert "kernels: eager (auto: the tensors are on cpu, not on CUDA), loss: plain" in classes.reason
    with pytest.raises(
        UserError, match="layers.kernels triton: the tensors are on cpu.*choose auto or eager"
    ):
        choose_layers(LayersConfig(kernels="triton"), EAGLE, ONE)
    with pytest.raises(UserError, match="loss_into_main_grad needs layers.loss fused"):
        choose_layers(LayersConfig(loss="plain", loss_into_main_grad=True), EAGLE, ONE)
    for config in (LayersConfig(linear="transformer_engine"), LayersConfig(norm="apex")):
        with pytest.raises(UserError, match="there is no CUDA device; choose another"):
            choose_layers(config, EAGLE, ONE)


def test_transformer_engine_rounds_only_where_it_is_asked_for(monkeypatch):
    """Its norms compute in another order than this project's, whose bits are those of transformers."""
    pytest.importorskip("megatron.core.extensions.transformer_engine", exc_type=ImportError)
    monkeypatch.setattr(layers, "why_not_library", lambda module: None)
    classes = choose_layers(LayersConfig(), EAGLE, ONE)
    assert classes.rms_norm.module is layers.RMSNorm and classes.layer_norm.module is layers.LayerNorm
    assert "linear layers: transformer_engine, norms: local" in classes.reason
    asked = choose_layers(LayersConfig(norm="transformer_engine"), EAGLE, ONE)
    assert asked.rms_norm is asked.layer_norm is not classes.rms_norm


def test_sums_in_fp32_are_tried_before_the_first_step(monkeypatch):
    """Where torch's `addmm` takes no out_dtype, a step would end in its TypeError: then the loss is plain."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert linear_cross_entropy.why_not_fused(cpu) is None
    monkeypatch.setattr(
        layers, "why_not_fused", lambda device: "torch 2.7 does not add" if device == gpu else None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    classes = choose_layers(LayersConfig("local", kernels="eager"), EAGLE, ONE)
    assert classes.fused_loss is None and "loss: plain (auto: torch 2.7 does not add)" in classes.reason
    with pytest.raises(UserError, match="layers.loss fused: torch 2.7 does not add; choose auto or plain"):
        choose_layers(LayersConfig("local", loss="fused", kernels="eager"), EAGLE, ONE)
    with pytest.raises(UserError, match="loss_into_main_grad needs layers.loss fused"):
        choose_layers(LayersConfig("local", loss_into_main_grad=True, kernels="eager"), EAGLE, ONE)


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (
            TypeError("addmm() got an unexpected keyword argument 'out_dtype'\nmore"),
            "keyword argument 'out_dtype'",
        ),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), "CUBLAS_STATUS_NOT_SUPPORTED"),
        (None, "it does not add to what is there"),
    ],
)
def test_a_torch_that_does_not_sum_in_fp32(failing, said, monkeypatch):
    def add_product(total, grad, chunk):
        if failing is not None:
            raise failing

    monkeypatch.setattr(linear_cross_entropy, "_add_product", add_product)
    reason = linear_cross_entropy.why_not_fused(torch.device("cpu"))
    assert reason.endswith(said) and "\n" not in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_this_gpu_sums_in_fp32():
    assert linear_cross_entropy.why_not_fused(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("text", "tensor_parallel", "obstacle"),
    [
        ({}, 2, None),
        ({}, 4, "the 40 feed-forward features of a tensor parallel rank are no multiple of 16"),
        (
            {"hidden_size": 72, "num_attention_heads": 4},
            1,
            "the 72 hidden features of the language model are no",
        ),
        ({"hidden_size": 96}, 1, "half of the head size, 6, is no power of two"),
    ],
)
def test_sizes_that_triton_does_not_take(text, tensor_parallel, obstacle, monkeypatch):
    """On a GPU, auto then takes the eager twins, where every rank would end in a traceback."""
    eagle, parallel = tiny_model(**text), ParallelConfig(tensor_parallel)
    monkeypatch.setattr(layers, "explain", lambda *_: (True, "triton (auto, on CUDA)"))
    classes = choose_layers(LayersConfig(loss="fused"), eagle, parallel)
    assert {classes.kernels, classes.fused_loss.kernels, classes.swiglu.params["kernels"]} == {
        "eager" if obstacle else "auto"
    }
    if obstacle is None:
        assert "kernels: triton (auto, on CUDA)" in classes.reason
        check_layers(LayersConfig(kernels="triton"), torch.float32, eagle, parallel)
        return
    assert f"kernels: eager (auto: {obstacle}" in classes.reason
    with pytest.raises(UserError, match=f"layers.kernels triton: {obstacle}.*; choose auto or eager"):
        check_layers(LayersConfig(kernels="triton"), torch.float32, eagle, parallel)


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        (
            LayersConfig(attention="flash"),
            torch.float32,
            "flash: it computes in bf16 and the model in float32",
        ),
        (LayersConfig(attention="te"), torch.float32, "te: it computes in bf16"),
        (
            LayersConfig(attention="cudnn"),
            torch.bfloat16,
            "head sizes of 8, 16, ... 256 and the model's is 12",
        ),
        (LayersConfig(loss="plain", loss_into_main_grad=True), torch.float32, "needs layers.loss fused"),
    ],
)
def test_what_no_machine_allows(config, dtype, message):
    with pytest.raises(UserError, match=message):
        check_layers(config, dtype, tiny_model(hidden_size=96), ONE)


@pytest.mark.gpu
@pytest.mark.skipif(
    layers.why_not_library("transformer_engine.pytorch") is not None, reason="no Transformer Engine"
)
def test_transformer_engine_takes_what_specifications_give():
    classes = choose_layers(LayersConfig("transformer_engine", "transformer_engine"), EAGLE, ONE)
    linear = inspect.signature(classes.column_parallel_linear.__init__).parameters
    assert {"input_size", "output_size", "config", "init_method", "bias", "tp_group"} <= linear.keys()
    norm = inspect.signature(classes.rms_norm.__new__).parameters
    assert {"config", "hidden_size", "eps"} <= norm.keys()

"""Optional libraries are found by importing them, and refused in one line where they are missing."""

import inspect

import pytest
import torch

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

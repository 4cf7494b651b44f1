"""Optional libraries are found by importing them, and refused in one line where they are missing."""

import inspect

import pytest
import torch

from megatron_eagle.errors import UserError
from megatron_eagle.model import layers
from megatron_eagle.model.layers import LayersConfig, choose_layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_a_gpu():
    classes = choose_layers(LayersConfig())
    assert classes.rms_norm.module is layers.RMSNorm and classes.fused_loss is None
    assert "no CUDA device" in classes.reason
    assert "kernels: eager (auto: the tensors are on cpu, not on CUDA), loss: plain" in classes.reason
    with pytest.raises(
        UserError, match="layers.kernels triton: the tensors are on cpu.*choose auto or eager"
    ):
        choose_layers(LayersConfig(kernels="triton"))
    with pytest.raises(UserError, match="loss_into_main_grad needs layers.loss fused"):
        choose_layers(LayersConfig(loss="plain", loss_into_main_grad=True))
    for config in (LayersConfig(linear="transformer_engine"), LayersConfig(norm="apex")):
        with pytest.raises(UserError, match="there is no CUDA device; choose another"):
            choose_layers(config)


@pytest.mark.gpu
@pytest.mark.skipif(layers.why_not("transformer_engine.pytorch") is not None, reason="no Transformer Engine")
def test_transformer_engine_takes_what_specifications_give():
    classes = choose_layers(LayersConfig("transformer_engine", "transformer_engine"))
    linear = inspect.signature(classes.column_parallel_linear.__init__).parameters
    assert {"input_size", "output_size", "config", "init_method", "bias", "tp_group"} <= linear.keys()
    norm = inspect.signature(classes.rms_norm.__new__).parameters
    assert {"config", "hidden_size", "eps"} <= norm.keys()

"""A checkpoint of the original model code: its logits and its gradients in every kind of layout."""

import json

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file

from megatron_eagle.checkpoint import load_checkpoint, read_model_config
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.cases import combine, forward_backward
from tests.parallel.harness import launch
from tests.paths import GOLDEN, need_golden

pytestmark = need_golden
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP2, cp_tp": (2, {"tensor_model_parallel_size": 2, "vision_sharding": "cp_tp"}),
    # Three language layers: the first stage has one, the last two.
    "PP2": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
    "CP2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "checkpoint"
    import_hf(GOLDEN / "tiny_eagle", folder)
    return str(folder)


def packed_row(labels: bool) -> dict:
    """The three samples and the padding of the golden file as one pack."""
    io = load_file(GOLDEN / "tiny_eagle_io.safetensors")
    ids, segments = io["packed.input_ids"][0], io["packed.attention_mask"][0]
    starts = (segments[1:] != segments[:-1]).nonzero().squeeze(1) + 1
    row = {
        "input_ids": ids,
        "position_ids": io["packed.position_ids"][0],
        "document_bounds": [0, *starts.tolist(), len(ids)],
        "pixel_values": io["pixel_values"][io["image_flags"].bool()],
    }
    if labels:
        row["labels"] = torch.cat([ids[1:], ids[:1]])
        row["loss_weights"] = torch.cat([io["packed.loss_weight"], torch.zeros(1)])
        row["filled"] = torch.ones(len(ids), dtype=torch.bool)  # only experts are balanced by it
    return row


def run_golden(checkpoint: str, parallel: dict) -> dict:
    """On one rank: its part of the logits, and its part of the golden loss's gradients."""
    config = read_model_config(checkpoint)
    cpu = torch.device("cpu")
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build_model(config, mesh, cpu)
        load_checkpoint(checkpoint, models=models)
        result = forward_backward(models, config, mesh, [packed_row(labels=True)])
        result |= pipeline_logits(models, config, mesh)
        return result


@torch.no_grad()
def pipeline_logits(models: list, config: EagleConfig, mesh) -> dict:
    """This rank's part of the logits, through the pipeline schedule; none before the last stage."""
    row = packed_row(labels=False)

    def forward_step(iterator, model):
        if mesh.pp.rank > 0:
            row["pixel_values"] = None
        inputs = make_input(config, mesh, torch.device("cpu"), targets=None, **row)
        tokens = inputs.packed.layout.token_index(mesh.cp.rank)
        return model(inputs), lambda out, non_loss_data: {"tokens": tokens, "logits": out[0].clone()}

    [part] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([row]),
        model=models[0],
        num_microbatches=1,
        seq_length=len(row["input_ids"]),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    ) or [{}]
    return part


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_loss_and_gradients(name, checkpoint):
    world_size, parallel = LAYOUTS[name]
    results = launch(run_golden, world_size, checkpoint, parallel)
    io = load_file(GOLDEN / "tiny_eagle_io.safetensors")
    logits = torch.full_like(io["packed.logits"][0], float("nan"))
    rows = logits.shape[1] // parallel.get("tensor_model_parallel_size", 1)
    for result in results:
        if "logits" in result:
            first = result["place"][0] * rows
            logits[result["tokens"], first : first + rows] = result["logits"]
    torch.testing.assert_close(logits, io["packed.logits"][0], rtol=0, atol=1e-4)

    outcome = combine(results)
    assert outcome.loss == pytest.approx(float(io["packed.loss_official"]), abs=1e-4)
    config = EagleConfig.from_hf(json.loads((GOLDEN / "tiny_eagle" / "config.json").read_text()))
    found = dict(ModelMapping(config, has_head=False).to_hf(outcome.gradients.__getitem__))
    stored = load_file(GOLDEN / "tiny_eagle_grads.safetensors")
    expected = {name.removeprefix("grad."): gradient for name, gradient in stored.items()}
    assert found.keys() >= expected.keys()
    errors = {
        tensor: float((found[tensor] - gradient).abs().max() / gradient.abs().max())
        for tensor, gradient in expected.items()
        # The true gradient of a key's bias is zero: only rounding is left.
        if not ("vision_model" in tensor and tensor.endswith("k_proj.bias"))
    }
    assert {tensor: error for tensor, error in errors.items() if not error <= 1e-3} == {}

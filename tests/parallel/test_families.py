"""Each language model against transformers' own: logits, loss and every gradient, in every kind of layout.

The checkpoint is transformers' (random weights, norms and biases too), imported as a published one.
"""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F

from megatron_eagle.checkpoint import load_checkpoint, read_model_config
from megatron_eagle.convert.checkpoint_forward import many_logits
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.hf_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.model import eagle
from megatron_eagle.model.yarn import YarnConfig
from megatron_eagle.runtime.parallel import model_parallel
from tests.parallel.cases import (
    FAMILIES,
    LANGUAGE_MODELS,
    Layout,
    Outcome,
    combine,
    forward_backward,
    global_batch,
    tiny_model,
)
from tests.parallel.harness import launch

LOGITS, GRADIENTS = 1e-4, 1e-3  # absolute, of logits up to about 3; and of a tensor's largest
# Two of each family.
QUICK = {
    "one process, qwen2 with YaRN",
    "CP2, qwen2 with YaRN",
    "one process, qwen3",
    "TP2+SP, qwen3",
    "one process, qwen3_moe",
    "TP2+SP, qwen3_moe",
}


def write_checkpoint(folder: Path, text: dict) -> None:
    """A model of random weights as transformers saves it, and what we make of it."""
    torch.manual_seed(0)
    model = Eagle2_5_VLForConditionalGeneration(Eagle2_5_VLConfig(**tiny_model(**text).to_hf()))
    for name, parameter in model.named_parameters():
        wide = 0.3 if "norm" in name else 0.15 if "_proj" in name else 0.05
        torch.nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=wide)
    model.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "checkpoint")


def documents(pack: dict) -> list[dict]:
    """A pack's documents: ids, labels and loss weights, and its tiles in reading order."""
    model, bounds, found, tiles = tiny_model(), pack["document_bounds"], [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        own = {name: pack[name][start:end] for name in ("input_ids", "labels", "loss_weights")}
        count = int((own["input_ids"] == model.image_token_index).sum()) // model.tokens_per_tile
        found.append(own | {"pixel_values": pack["pixel_values"][tiles : tiles + count]})
        tiles += count
    return found


class Theirs:
    """transformers' model: logits of every document, the loss of the batch, gradients by its names."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint"
        model = Eagle2_5_VLForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
        self.batch = global_batch(read_model_config(self.checkpoint))
        self.documents = [document for pack in self.batch for document in documents(pack)]
        self.logits, loss = [], torch.zeros(())
        for document in self.documents:
            out = model(input_ids=document["input_ids"][None], pixel_values=document["pixel_values"])
            self.logits.append(out.logits[0].detach())
            losses = F.cross_entropy(out.logits[0], document["labels"], reduction="none")
            loss = loss + (losses * document["loss_weights"]).sum()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        alive = (_saved(name, g) for name, g in gradients.items() if g is not None)
        self.outcome = living(Outcome(loss.item(), {n: g for saved in alive for n, g in saved.items()}))


def _saved(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """As in a checkpoint: in memory transformers 5 drops a level of the encoder's names, and has all experts
    of a layer in one."""
    prefix = "vision_model."
    if name.startswith(prefix) and not name.startswith(2 * prefix):
        return {prefix + name: tensor}
    if ".experts." not in name:
        return {name: tensor}
    layer, _, kind = name.rpartition(".")
    parts = {kind: tensor}
    if kind == "gate_up_proj":
        parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True))
    return {f"{layer}.{e}.{k}.weight": one for k, whole in parts.items() for e, one in enumerate(whole)}


def run_checkpoint(layout: Layout, checkpoint: str) -> dict:
    """As `cases.run`, with the weights of a checkpoint."""
    config = read_model_config(checkpoint)
    with model_parallel(layout.config) as mesh:
        models = eagle.build_model(config, mesh, torch.device("cpu"), torch.float32)
        load_checkpoint(checkpoint, models=models)
        return forward_backward(models, config, mesh, global_batch(config))


def outcome(layout: Layout, theirs: Theirs, function=run_checkpoint, **options) -> Outcome:
    """Ours, with transformers' names."""
    results = launch(function, layout.world_size, layout, str(theirs.checkpoint))
    ours = combine(results, **options)
    plan = ModelMapping(read_model_config(theirs.checkpoint), has_head=False)
    return living(Outcome(ours.loss, dict(plan.to_hf(ours.gradients.__getitem__))))


def living(found: Outcome) -> Outcome:
    """Without the encoder's biases of keys, which shift all scores of a query alike: their gradient is 0."""
    dead = [name for name in found.gradients if re.search("vision_model.*k_proj.bias", name)]
    assert len(dead) == 2 and all(found.gradients[name].abs().max() < 1e-6 for name in dead)
    return Outcome(found.loss, {n: g for n, g in found.gradients.items() if n not in dead})


@pytest.fixture(scope="module")
def theirs(request, tmp_path_factory) -> Theirs:
    folder = tmp_path_factory.mktemp("family")
    write_checkpoint(folder, LANGUAGE_MODELS[request.param])
    return Theirs(folder)


def cells(*layouts: str) -> list:
    """(family, layout) in the families' order, so that each is made once; None: all rows."""
    found = []
    for family, text in LANGUAGE_MODELS.items():
        for layout in (layout for layout in FAMILIES if layout.text is text):
            if not layouts or str(layout) in layouts:
                marks = () if str(layout) in QUICK or layouts else pytest.mark.slow
                found.append(pytest.param(family, layout, id=str(layout), marks=marks))
    return found


@pytest.mark.parametrize(("theirs", "layout"), cells(), indirect=["theirs"])
def test_loss_and_gradients_are_transformers(theirs, layout):
    errors = outcome(layout, theirs).errors(theirs.outcome)
    assert {name: error for name, error in errors.items() if not error <= GRADIENTS} == {}


@pytest.mark.parametrize("theirs", LANGUAGE_MODELS, indirect=True)
def test_logits_are_transformers(theirs):
    assert furthest(theirs) <= LOGITS


def furthest(theirs: Theirs) -> float:
    """Largest difference of two logits."""
    prompts = [(document["input_ids"], document["pixel_values"]) for document in theirs.documents]
    pairs = zip(many_logits(theirs.checkpoint, prompts), theirs.logits, strict=True)
    return max(float((ours[0] - expected).abs().max()) for ours, expected in pairs)


@pytest.mark.parametrize("theirs", ["qwen2 with YaRN"], indirect=True)
def test_an_attention_factor_that_is_left_out_is_noticed(theirs):
    with patch.object(YarnConfig, "amplitude", 1.0):
        assert furthest(theirs) > 100 * LOGITS


def _run_unsummed(layout: Layout, checkpoint: str) -> dict:
    """Megatron does not know that ranks see other heads under one norm."""
    build = eagle.build_model

    def unaware(*arguments: Any) -> list:
        models = build(*arguments)
        for model in models:
            assert model.config.qk_layernorm
            model.config.qk_layernorm = False
        return models

    with patch.object(eagle, "build_model", unaware):
        return run_checkpoint(layout, checkpoint)


@pytest.mark.parametrize(("theirs", "layout"), cells("TP2, qwen3"), indirect=["theirs"])
def test_norms_of_heads_that_tensor_parallel_ranks_do_not_sum_are_noticed(theirs, layout):
    errors = outcome(layout, theirs, _run_unsummed, check_replicas=False).errors(theirs.outcome)
    wrong = {name.split(".")[-2] for name, error in errors.items() if error > 100 * GRADIENTS}
    assert wrong == {"q_norm", "k_norm"}

"""Every parallel layout against one process: the loss and all parameter gradients."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.model import layers
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.mutants.mutant import Mutant
from tests.parallel.cases import (
    LAYOUTS,
    ONE_PROCESS,
    SEQUENCES,
    VARIANTS,
    Layout,
    Outcome,
    cell,
    combine,
    forward_backward,
    global_batch,
    run,
    tiny_model,
)
from tests.parallel.harness import launch

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32


def outcome(layout: Layout, function=run, **text) -> Outcome:
    return combine(launch(function, layout.world_size, layout, tiny_model(**text)))


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return outcome(ONE_PROCESS)


def _more(layout: Layout) -> bool:
    """Of eight ranks; or of four, with vision sharding that another of its name goes beyond."""
    name, _, sharding = str(layout).rpartition(", ")
    beyond = {"none": ("cp", "cp_tp"), "cp": ("cp_tp",)}.get(sharding, ())
    others = {str(other) for other in LAYOUTS}
    less = any(f"{name}, {more}" in others for more in beyond)
    return layout.world_size > 4 or (layout.world_size == 4 and less)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=pytest.mark.slow if _more(each) else ()) for each in LAYOUTS],
    ids=str,
)
def test_layout_equals_one_process(layout, reference):
    errors = outcome(layout).errors(reference)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=pytest.mark.slow if each.world_size > 4 else ()) for each in SEQUENCES],
    ids=str,
)
def test_several_packs_a_sequence_equal_one_process_and_one_pack(layout, reference):
    found = outcome(layout)
    errors = found.errors(reference)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    alone = replace(layout, packs=1, world_size=layout.world_size // layout.packs)
    assert found.worst(outcome(alone))[0] <= TOLERANCE


@pytest.mark.parametrize("layout", VARIANTS, ids=str)
def test_options_and_heads_equal_one_process(layout, reference):
    expected = outcome(ONE_PROCESS, **layout.text) if layout.text else reference
    assert outcome(layout, **layout.text).worst(expected)[0] <= TOLERANCE


def test_every_gradient_of_the_reference_is_alive(reference):
    dead = [name for name, gradient in reference.gradients.items() if not gradient.abs().max() > 1e-6]
    assert dead == []


# What is dropped -> (a layout that must notice, a part of its call sites' names). `make parity-mutants` drops
# every one, and doubles it.
DROPPED = {
    "dK/dV, reduce-scatter": ("CP2, zigzag", " in start_return < GatherKVAttention.backward"),
    "dK/dV, all-to-all": ("CP4, balanced", " in start_return < GatherKVAttention.backward"),
    "keys round a ring, forward": ("Ring 2, zigzag", " in _start_keys < _blocks < RingAttention.forward"),
    "keys round a ring, backward": ("Ring 2, zigzag", " in _start_keys < _blocks < RingAttention.backward"),
    "dK/dV round a ring": ("Ring 4, zigzag_per_document", " in _Gradients.__init__ < RingAttention.backward"),
    "Ulysses before attention, backward": ("Ulysses 2, balanced", "TokensToHeads.backward"),
    "Ulysses after attention, backward": ("Ulysses 2, balanced", "HeadsToTokens.backward"),
    "Ulysses before attention, copies of KV heads, backward": (
        "Ulysses 8 of 4 KV heads, balanced",
        "TokensToHeads.backward",
    ),
    "vision features, backward exchange": ("CP2, cp", " in _Exchange.backward"),
    "pixels that other ranks decoded": ("TP2, none", " in gather_tiles"),
    "vision features over tensor parallel ranks, backward": (
        "TP2+SP, none",
        "copy_to_tensor_model_parallel_region < EagleModel._embed",
    ),
    "whole encoder's gradients over tensor parallel ranks": ("TP2, cp_tp", " in sum_encoder_gradients"),
    "cross-entropy over tensor parallel ranks": ("TP2, none", " in _VocabParallelCrossEntropy.forward"),
    "gradients over data parallel ranks": ("DP2, none", " in _ParamAndGradBucketGroup.start_grad_sync"),
}


def _error_of(function, name: str, reference: Outcome) -> float:
    results = launch(function, cell(name).world_size, cell(name), tiny_model())
    return combine(results, check_replicas=False).worst(reference)[0]


@pytest.mark.parametrize("what", DROPPED)
def test_a_dropped_collective_is_noticed(what, reference):
    layout, place = DROPPED[what]
    with Mutant("collective", place, part=True).in_force(timeout=120):  # none of these hangs
        assert _error_of(run, layout, reference) > 100 * TOLERANCE


class _UnmarkedNorm(layers.RMSNorm):
    """Megatron no longer knows that this weight's gradient must be summed over tensor parallel ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.sequence_parallel = False


def _run_unmarked(*arguments) -> dict:
    with patch.object(layers, "RMSNorm", _UnmarkedNorm):
        return run(*arguments)


def test_a_weight_that_a_collective_leaves_out_is_noticed(reference):
    assert _error_of(_run_unmarked, "TP2+SP, none", reference) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("layout", "language", "vision"),
    [
        ("TP2+SP x CP2, cp_tp", "selective", "none"),
        ("TP2+SP x CP2, cp_tp", "full", "full"),
        ("PP2 x VPP2, none", "full", "full"),
        ("TP2 x CP2, cp", "none", "full"),
        ("Ring 2, zigzag", "full", "none"),
    ],
)
def test_recomputation_is_exact(layout, language, vision, reference):
    recompute = RecomputeConfig(language, vision)
    results = launch(run, cell(layout).world_size, cell(layout), tiny_model(), torch.float32, recompute)
    assert combine(results).worst(reference)[0] <= TOLERANCE


@pytest.mark.parametrize("in_fp32", [True, False])
def test_gradients_are_summed_in_the_type_that_is_asked_for(in_fp32, reference):
    """bf16 models over two replicas: sums in bf16 round once more."""
    layout = Layout("DP2", 2, {"grad_reduce_in_fp32": in_fp32})
    found = combine(launch(run, 2, layout, tiny_model(), torch.bfloat16))
    types = {gradient.dtype for gradient in found.gradients.values()}
    assert types == {torch.float32 if in_fp32 else torch.bfloat16}
    assert found.worst(reference)[0] < 0.2


def _run_with_large_logits(layout: Layout, layers: LayersConfig) -> dict:
    """Logits of several hundred, whose exponentials fp32 cannot hold."""
    eagle = tiny_model()
    with model_parallel(ParallelConfig(**layout.parallel)) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"), layers=layers)
        initialize_parameters(models, seed=1)
        with torch.no_grad():
            models[-1].language_model.output_layer.weight.mul_(2000)
        return forward_backward(models, eagle, mesh, global_batch(eagle))


@pytest.mark.parametrize("loss", ["plain", "fused"])
def test_large_logits(loss):
    found, expected = (
        combine(launch(_run_with_large_logits, at.world_size, at, LayersConfig(loss=loss)))
        for at in (cell("TP2, none"), ONE_PROCESS)
    )
    assert expected.loss > 100
    assert found.worst(expected)[0] <= 1e-3  # so much do differences of such logits round


def _with_padding(padding: int) -> dict:
    """One pack whose last document is `padding` tokens without weights."""
    eagle = tiny_model()
    pack = global_batch(eagle)[3]
    length = pack["document_bounds"][-2] + padding
    for name in ("input_ids", "position_ids", "labels", "loss_weights"):
        pack[name] = pack[name][:length]
    pack["loss_weights"][length - padding :] = 0
    pack["document_bounds"] = sorted({*pack["document_bounds"][:-1], length})
    with model_parallel(ParallelConfig()) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"))
        initialize_parameters(models, seed=1)
        return forward_backward(models, eagle, mesh, [pack])


def test_padding_changes_nothing():
    plain, padded = (combine(launch(_with_padding, 1, padding)) for padding in (0, 8))
    assert padded.worst(plain)[0] <= TOLERANCE


def _attention_calls(recompute: RecomputeConfig) -> int:
    with patch.object(
        ReferenceAttention, "forward", autospec=True, side_effect=ReferenceAttention.forward
    ) as f:
        run(ONE_PROCESS, tiny_model(), torch.float32, recompute)
        return f.call_count


def test_recomputation_takes_place():
    calls = [
        launch(_attention_calls, 1, RecomputeConfig(policy))[0] for policy in ("none", "selective", "full")
    ]
    layers, packs = tiny_model().text.num_hidden_layers, 4
    assert calls == [layers * packs, 2 * layers * packs, 2 * layers * packs]


def _few_packs(layout: Layout) -> dict:
    """Half of the batch: with virtual stages, no forward is left when the first backward begins."""
    eagle = tiny_model()
    with model_parallel(ParallelConfig(**layout.parallel)) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"))
        initialize_parameters(models, seed=1)
        return forward_backward(models, eagle, mesh, global_batch(eagle)[:2])


def test_as_many_microbatches_as_stages():
    found, expected = (
        combine(launch(_few_packs, at.world_size, at)) for at in (cell("PP2 x VPP2, none"), ONE_PROCESS)
    )
    assert found.worst(expected)[0] <= TOLERANCE


def test_tied_embeddings_across_the_pipeline():
    tied = {"tie_word_embeddings": True}
    assert outcome(cell("PP2, none"), **tied).worst(outcome(ONE_PROCESS, **tied))[0] <= TOLERANCE


def _bf16_loss() -> float:
    return run(ONE_PROCESS, tiny_model(), torch.bfloat16)["loss"]


def test_bf16_is_close_to_fp32(reference):
    [loss] = launch(_bf16_loss, 1)
    assert loss == pytest.approx(reference.loss, rel=1e-2)


def _refusal(parallel: dict) -> str:
    try:
        with model_parallel(ParallelConfig(**parallel)):
            return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_impossible_world_is_refused():
    [message, _] = launch(_refusal, 2, {"tensor_model_parallel_size": 4})
    assert message.startswith("UserError: 2 processes cannot hold tensor 4")

"""Activation offload in every kind of layout: loss and all gradients are those without it, bit for bit."""

from unittest.mock import patch

import pytest
import torch

from eagle_kernels.activation_offload import HostStore, KeptResults, Offloaded
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.layers import LayersConfig
from megatron_eagle.model.lora import LoraConfig, add_lora
from megatron_eagle.model.parts import freeze
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.cases import (
    ONE_PROCESS,
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

NONE, OFFLOAD = RecomputeConfig(), RecomputeConfig("offload", offload_keep_last=1)
LAYERS, PACKS = tiny_model().text.num_hidden_layers, 4


def _differing(one: Outcome, other: Outcome) -> list[str]:
    assert one.gradients.keys() == other.gradients.keys()
    names = [n for n, gradient in one.gradients.items() if not torch.equal(other.gradients[n], gradient)]
    return names + ["loss"] * (one.loss != other.loss)


@pytest.mark.parametrize(
    ("name", "keep_last"),
    [
        ("one process", 0),
        ("TP2+SP, none", 1),
        ("PP2 x VPP2, none", 0),
        ("CP2, cp", 1),
        ("Ulysses 2, balanced", 2),
        ("Ring 2, zigzag", 1),
        pytest.param("PP2, none", 1, marks=pytest.mark.slow),
        pytest.param("DP2 overlapped, none", 1, marks=pytest.mark.slow),
        pytest.param("TP2+SP x PP2 x VPP2 x CP2, cp_tp", 0, marks=pytest.mark.slow),
    ],
)
def test_changes_no_bit(name, keep_last):
    layout, layers = cell(name), LayersConfig(loss="fused")
    plain, offloaded = (
        combine(launch(run, layout.world_size, layout, tiny_model(), torch.float32, policy, layers))
        for policy in (NONE, RecomputeConfig("offload", offload_keep_last=keep_last))
    )
    assert _differing(plain, offloaded) == []


def _run_parts(trainable: list[str], lora: bool, recompute: RecomputeConfig) -> dict:
    """`cases.run` with frozen parts or adapters, on packs of different lengths."""
    eagle, batch = tiny_model(), global_batch(tiny_model())
    for pack in batch[:2]:
        *bounds, _ = pack["document_bounds"]
        pack["document_bounds"] = bounds
        for name in ("input_ids", "position_ids", "labels", "loss_weights"):
            pack[name] = pack[name][: bounds[-1]]
        tiles = int((pack["input_ids"] == eagle.image_token_index).sum()) // eagle.tokens_per_tile
        pack["pixel_values"] = pack["pixel_values"][:tiles]
    with model_parallel(ParallelConfig()) as mesh:
        models = build_model(eagle, mesh, torch.device("cpu"), recompute=recompute)
        freeze(models, trainable, None)
        initialize_parameters(models, seed=1)
        if lora:
            add_lora(models, LoraConfig(rank=2), seed=1)
        return forward_backward(models, eagle, mesh, batch)


@pytest.mark.parametrize(
    ("trainable", "lora"), [(["language"], False), (["connector"], False), (["language"], True)]
)
def test_with_frozen_parts_and_adapters(trainable, lora):
    """With `language` alone, nothing before the first layer asks for a gradient."""
    plain, offloaded = (combine(launch(_run_parts, 1, trainable, lora, policy)) for policy in (NONE, OFFLOAD))
    assert plain.gradients and _differing(plain, offloaded) == []


def _counted(layout: Layout, recompute: RecomputeConfig) -> dict:
    """Runs of attention, and slots asked for, made and given back over one global batch."""
    stores = []
    make = HostStore.__init__

    def remember(self, *args):
        make(self, *args)
        stores.append(self)

    with (
        patch.object(HostStore, "__init__", remember),
        patch.object(
            ReferenceAttention, "forward", autospec=True, side_effect=ReferenceAttention.forward
        ) as attention,
        patch.object(HostStore, "_take", autospec=True, side_effect=HostStore._take) as take,
    ):
        run(layout, tiny_model(), torch.float32, recompute)
    [store] = stores
    return {
        "attention": attention.call_count,
        "taken": take.call_count,
        "slots": store.slots,
        "back": len(store._free),
    }


@pytest.mark.parametrize(
    ("name", "keep_last", "in_flight"),
    [("one process", 1, [1]), ("PP2, none", 1, [2, 1]), ("PP2 x VPP2, none", 0, [5, 3])],
)
def test_attention_runs_once_and_the_slab_is_as_large_as_the_schedule_needs(name, keep_last, in_flight):
    layout, recompute = cell(name), RecomputeConfig("offload", offload_keep_last=keep_last)
    chunks = ParallelConfig(**layout.parallel).num_model_chunks
    per_chunk = LAYERS // layout.world_size // chunks
    offloaded = per_chunk - keep_last
    ranks = launch(_counted, layout.world_size, layout, recompute)
    for forwards, found in zip(in_flight, ranks, strict=True):
        assert found == {
            "attention": per_chunk * chunks * PACKS,
            "taken": offloaded * chunks * PACKS,
            "slots": offloaded * forwards,
            "back": offloaded * forwards,  # no slot beyond the first slab was ever needed
        }


def _forgotten(self) -> list[torch.Tensor]:
    x, out, lse = _take(self)
    return [x, out, torch.zeros_like(lse)]


def _computed_again(self, compute):
    """Attention of the second run sees what the first left behind: nothing."""
    if self.results is None:
        self.results = compute()
    return tuple(torch.zeros_like(result) for result in self.results)


_take = Offloaded.take
SABOTAGES = {
    "statistics": lambda: patch.object(Offloaded, "take", _forgotten),
    "attention's results": lambda: patch.object(KeptResults, "once", _computed_again),
}


def _run_sabotaged(name: str) -> dict:
    with SABOTAGES[name]():
        return run(ONE_PROCESS, tiny_model(), torch.float32, OFFLOAD)


@pytest.mark.parametrize("name", SABOTAGES)
def test_lost_tensors_are_noticed(name):
    plain = combine(launch(run, 1, ONE_PROCESS, tiny_model()))
    assert combine(launch(_run_sabotaged, 1, name)).worst(plain)[0] > 1e-3


def test_a_negative_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="offload_keep_last is -1: must lie between 0 and"):
        RecomputeConfig("offload", offload_keep_last=-1)

"""A layer's experts and the auxiliary loss of their router against transformers, in one process."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock, load_balancing_loss_func

from megatron_eagle.context_parallel.pack_rows import rows_of_packs
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.experts import MixtureOfExperts, balance_loss, take_balance
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.parts import freeze
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from tests.parallel.cases import EXPERTS, tiny_model

ROWS, LAYERS = 48, 4


@contextmanager
def one_process() -> Iterator[Mesh]:
    device = Device("cpu")
    with device.context(), process_group(device), model_parallel(ParallelConfig()) as mesh:
        yield mesh


def built(mesh: Mesh, recompute: RecomputeConfig | None = None, **experts) -> EagleModel:
    eagle = tiny_model(**{**EXPERTS, "experts": {**EXPERTS["experts"], **experts}})
    [model] = build_model(eagle, mesh, torch.device("cpu"), recompute=recompute)
    initialize_parameters([model], seed=1)
    return model


def layer_of(model: EagleModel) -> MixtureOfExperts:
    layer = model.language_model.decoder.layers[0].mlp
    with torch.no_grad():
        layer.router.weight.mul_(20)  # as decided as a trained one
    return layer


def twin_of(layer: MixtureOfExperts, normalised: bool) -> Qwen3MoeSparseMoeBlock:
    config = layer.config
    twin = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_ffn_hidden_size,
            num_experts=config.num_moe_experts,
            num_experts_per_tok=config.moe_router_topk,
            norm_topk_prob=normalised,
        )
    )
    with torch.no_grad():
        twin.gate.weight.copy_(layer.router.weight)
        for number, expert in enumerate(layer.experts.local_experts):
            twin.experts.gate_up_proj[number].copy_(expert.linear_fc1.weight)
            twin.experts.down_proj[number].copy_(expert.linear_fc2.weight)
    return twin


def outcome(block, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its output, and the gradient of its input; gradients of weights stay with them."""
    hidden = hidden.detach().requires_grad_()
    out = block(hidden)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out, hidden.grad


@pytest.mark.parametrize("normalised", [True, False])
def test_layer_equals_that_of_transformers(normalised):
    hidden = torch.randn(ROWS, 1, 64, generator=torch.Generator().manual_seed(0))
    with one_process() as mesh:
        layer = layer_of(built(mesh, norm_topk_prob=normalised))
        twin, other = twin_of(layer, normalised), twin_of(layer, not normalised)
        found, expected, wrong = (outcome(block, hidden) for block in (layer, twin, other))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(layer.router.weight.grad, twin.gate.weight.grad, rtol=1e-4, atol=1e-6)
        for number, expert in enumerate(layer.experts.local_experts):
            for linear, stacked in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
                ours, theirs = (
                    getattr(expert, linear).weight.grad,
                    getattr(twin.experts, stacked).grad[number],
                )
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert (found[0] - wrong[0]).abs().max() > 1e-3, "other probabilities would be seen"


def theirs(logits: torch.Tensor, k: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    return load_balancing_loss_func((logits,), logits.shape[1], k, mask)


def ours(logits: torch.Tensor, k: int, filled: torch.Tensor, packs: int, step_packs: int) -> torch.Tensor:
    scores = logits.softmax(-1)
    chosen = F.one_hot(scores.topk(k).indices, logits.shape[1]).sum(1).bool()
    rows = rows_of_packs(filled, torch.arange(len(logits)), packs, step_packs)
    return balance_loss(scores, chosen, rows, torch.distributed.group.WORLD)


def test_auxiliary_loss_is_that_of_transformers():
    """One pack; its padding left out; several packs of a sequence: the mean of theirs."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, 8, generator=generator).requires_grad_()
    whole, filled = torch.ones(ROWS, dtype=torch.bool), torch.arange(ROWS) < 31
    half = ROWS // 2
    pairs = {
        "a pack": (lambda: ours(logits, 2, whole, 1, 1), lambda: theirs(logits, 2)),
        "padding": (lambda: ours(logits, 2, filled, 1, 1), lambda: theirs(logits, 2, filled)),
        "of a step": (lambda: ours(logits, 2, filled, 1, 4), lambda: theirs(logits, 2, filled) / 4),
        "two packs": (
            lambda: ours(logits, 2, filled, 2, 2),
            lambda: (theirs(logits[:half], 2) + theirs(logits[half:], 2, filled[half:])) / 2,
        ),
    }
    with one_process():
        for name, losses in pairs.items():
            found, expected = ((loss := f(), *torch.autograd.grad(loss, logits)) for f in losses)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9, msg=name)
        assert not torch.allclose(ours(logits, 2, filled, 1, 1), theirs(logits, 2), rtol=1e-3)


def test_a_pack_of_padding_alone_has_no_loss():
    logits = torch.randn(8, 8)
    with one_process():
        assert ours(logits, 2, torch.zeros(8, dtype=torch.bool), 1, 1) == 0


@pytest.mark.parametrize(
    "recompute", [None, RecomputeConfig("selective", recompute_modules=("moe",))], ids=["kept", "again"]
)
def test_the_router_learns_from_the_auxiliary_loss(recompute):
    """Its gradient is that of the definition, once, and so is what it says of it; nothing without a weight,
    without packs, or frozen."""
    hidden = torch.randn(ROWS, 1, 64, generator=torch.Generator().manual_seed(0))
    rows = rows_of_packs(torch.arange(ROWS) < 31, torch.arange(ROWS), 1, 2)

    def gradient(model: EagleModel, packs, said: float) -> torch.Tensor | None:
        layer = layer_of(model)
        layer.rows = packs
        out, _ = layer(hidden.detach().requires_grad_())
        layer.rows = None  # another microbatch's, when it is computed again
        out.sum().backward()
        assert take_balance([model], hidden.device).item() == pytest.approx(said, rel=1e-5)
        assert take_balance([model], hidden.device).item() == 0, "it was taken"
        return layer.router.weight.grad

    with one_process() as mesh:
        weight = layer_of(built(mesh)).router.weight.detach().requires_grad_()
        mean = theirs(hidden.squeeze(1) @ weight.T, 2, torch.arange(ROWS) < 31) / LAYERS / 2
        loss = 7.0 * mean
        plain = gradient(built(mesh, recompute, router_aux_loss_coef=0.0), rows, 0)
        assert torch.equal(gradient(built(mesh, recompute, router_aux_loss_coef=7.0), None, 0), plain)
        found = gradient(built(mesh, recompute, router_aux_loss_coef=7.0), rows, mean.item())
        torch.testing.assert_close(found - plain, *torch.autograd.grad(loss, weight), rtol=1e-4, atol=1e-6)
        frozen = built(mesh, recompute, router_aux_loss_coef=7.0)
        freeze([frozen], ["language"], None, freeze_router=True)
        assert gradient(frozen, rows, 0) is None
        still = {
            name
            for name, p in frozen.named_parameters()
            if name.startswith("language_model.") and not p.requires_grad
        }
        assert still == {f"language_model.decoder.layers.{n}.mlp.router.weight" for n in range(LAYERS)}


def test_a_layer_that_is_computed_again_leaves_nothing_behind():
    """Megatron's dispatcher keeps the router's weights; with their graph, the input and its gradient."""
    hidden, inputs = torch.randn(ROWS, 1, 64).requires_grad_(), []
    with one_process() as mesh:
        layer = layer_of(built(mesh, RecomputeConfig("selective", recompute_modules=("moe",))))
        layer.router.register_forward_pre_hook(lambda _, given: inputs.append(weakref.ref(given[0])))
        layer(hidden)[0].sum().backward()
    _, again = inputs
    assert again() is None


def test_every_row_is_of_its_pack_once():
    """Whatever ranks hold which rows, and with padding inside of documents."""
    filled = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.8
    held = torch.cat([torch.randperm(64, generator=torch.Generator().manual_seed(2)), torch.tensor([-1, -1])])
    parts = [rows_of_packs(filled, own, 4, 8) for own in held.split([20, 30, 16])]
    assert torch.equal(sum(part.member.sum(1) for part in parts), parts[0].tokens)
    assert parts[0].tokens.tolist() == filled.view(4, 16).sum(1).tolist()
    assert parts[0].share == 1 / 8

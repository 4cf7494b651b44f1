"""LoRA under every kind of layout: all gradients, what it costs, training, checkpoints."""

import shutil
from unittest.mock import patch

import pytest
import torch
import yaml

from megatron_eagle.checkpoint import TrainState, load_checkpoint, read_lora_config, save_checkpoint
from megatron_eagle.config import from_dict, to_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model import lora
from megatron_eagle.model.eagle import EagleModel, build_model
from megatron_eagle.model.flops import PARTS
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.lora import TARGETS, LoraConfig, add_lora, check_same_lora
from megatron_eagle.model.parts import freeze
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.optimizer import OptimizerConfig, build_optimizer, build_scheduler, wrap_models
from megatron_eagle.training.run_config import load_run_config
from tests.mutants.mutant import Mutant
from tests.parallel.cases import (
    ONE_PROCESS,
    Outcome,
    combine,
    forward_backward,
    global_batch,
    run,
    tiny_model,
)
from tests.parallel.harness import launch
from tests.training.test_training_loop import train_rank, write_run

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32
ALL = LoraConfig(rank=3, alpha=6.0)
SOME = LoraConfig(rank=2, target_modules=["o_proj", "k_proj", "up_proj"])
OPTIMIZER = OptimizerConfig(lr=2e-2, lr_warmup_fraction=0.0, weight_decay=0.1)
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}


def build(
    mesh: Mesh, config: LoraConfig, trainable=PARTS, recompute: RecomputeConfig | None = None
) -> list[EagleModel]:
    """A model with fresh adapters, made in the order of a run."""
    models = build_model(tiny_model(), mesh, torch.device("cpu"), recompute=recompute)
    freeze(models, trainable, None)
    initialize_parameters(models, seed=1)
    add_lora(models, config, seed=1)
    return models


@torch.no_grad()
def fill_b(models: list[EagleModel]) -> None:
    """As if trained: each element of B a function of its place in the whole matrix. A then has gradients."""
    for model in models:
        for name, parameter in model.named_parameters():
            if ".lora_" in name and name.endswith("_b"):
                is_split = getattr(parameter, "tensor_model_parallel", False)
                first = model.mesh.tp.rank * len(parameter) if is_split else 0
                rows = torch.arange(first, first + len(parameter))[:, None]
                parameter.copy_(torch.sin(3 * rows + torch.arange(parameter.shape[1])) / 4)


def run_lora(parallel: dict, config: LoraConfig = ALL, trainable=PARTS, recompute=None) -> dict:
    """`cases.run` with adapters."""
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build(mesh, config, trainable, recompute)
        fill_b(models)
        return forward_backward(models, tiny_model(), mesh, global_batch(tiny_model()))


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return combine(launch(run_lora, 1, {}))


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, TP2),
        (2, TP2_SP),
        (2, PP2),
        (2, CP2),
        pytest.param(4, TP2_SP | VPP2, marks=pytest.mark.slow),
        pytest.param(2, {"overlap_grad_reduce": True}, marks=pytest.mark.slow),
        pytest.param(4, TP2_SP | CP2 | {"vision_sharding": "cp_tp"}, marks=pytest.mark.slow),
        pytest.param(8, TP2_SP | PP2 | CP2, marks=pytest.mark.slow),
    ],
    ids=["tp2", "tp2sp", "pp2", "cp2", "tp2sp-vpp2", "dp2", "tp2sp-cp2", "tp2sp-pp2-cp2"],
)
def test_layout_equals_one_process(world_size, parallel, reference):
    errors = combine(launch(run_lora, world_size, parallel)).errors(reference)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def test_of_the_language_model_adapters_alone_have_gradients_and_none_is_dead(reference):
    language = [name for name in reference.gradients if name.startswith("language_model.")]
    assert len(language) == tiny_model().text.num_hidden_layers * len(TARGETS) * 2
    assert all(".lora_" in name for name in language)
    assert len(reference.gradients) > len(language)  # encoder and connector train as before
    assert [name for name, gradient in reference.gradients.items() if not gradient.abs().max() > 1e-6] == []


def test_some_targets_with_all_else_frozen_and_recomputed():
    """Nothing before the first layer needs a gradient; fused layers have adapters on some of their rows."""
    expected = combine(launch(run_lora, 1, {}, SOME))
    found = combine(launch(run_lora, 2, TP2_SP, SOME, ("language",), RecomputeConfig("full")))
    adapters = {name: g for name, g in expected.gradients.items() if ".lora_" in name}
    assert found.worst(Outcome(expected.loss, adapters))[0] <= TOLERANCE


@pytest.mark.parametrize(
    ("parallel", "place"),
    [
        (TP2, "copy_to_tensor_model_parallel_region < ColumnAdapter.forward"),
        (
            TP2_SP,
            "Region.backward < gather_from_sequence_parallel_region < ColumnAdapter.forward",
        ),
    ],
    ids=["backward sum over shares of B", "backward reduce-scatter over shares of B"],
)
def test_a_dropped_collective_is_noticed(parallel, place, reference):
    with Mutant("collective", place, part=True).in_force():
        results = launch(run_lora, 2, parallel)
    assert combine(results, check_replicas=False).worst(reference)[0] > 100 * TOLERANCE


_make_adapter = lora._Adapter.__init__


def _make_unmarked(self, *args):
    _make_adapter(self, *args)
    for parameter in self.parameters():
        parameter.sequence_parallel = False


def _run_unmarked() -> dict:
    with patch.object(lora._Adapter, "__init__", _make_unmarked):
        return run_lora(TP2_SP)


def test_whole_factors_that_are_not_summed_over_ranks_with_other_tokens_are_noticed(reference):
    results = launch(_run_unmarked, 2)
    assert combine(results, check_replicas=False).worst(reference)[0] > 100 * TOLERANCE


def train(parallel: dict, until: int, load: str | None = None, save: str | None = None) -> dict:
    """Steps of the adapters and the connector, from fresh ones or from `load`; `save` keeps the second."""
    eagle = tiny_model()
    with model_parallel(ParallelConfig(**parallel)) as mesh:
        models = build(mesh, ALL, ("connector", "language"))
        wrapped = wrap_models(models)
        optimizer = build_optimizer(OPTIMIZER, wrapped)
        scheduler = build_scheduler(OPTIMIZER, optimizer, train_iterations=20)
        everything = {"models": wrapped, "optimizer": optimizer, "scheduler": scheduler}
        state = TrainState() if load is None else load_checkpoint(load, **everything)
        steps = []
        for iteration in range(state.iteration + 1, until + 1):
            loss = forward_backward(models, eagle, mesh, global_batch(eagle), wrapped)["loss"]
            steps.append((loss, optimizer.step()[1]))
            scheduler.step(1)
            if iteration == 2 and save is not None:
                save_checkpoint(save, **everything, run_config={"model": eagle, "lora": ALL}, iteration=2)
        [adam] = [part.optimizer for part in optimizer.chained_optimizers]
        return {
            "steps": steps,
            "trained": sum(p.numel() for model in models for p in model.parameters() if p.requires_grad),
            "buffered": sum(buffer.numel for model in wrapped for buffer in model.buffers),
            "moments": sum(state["exp_avg"].numel() for state in adam.state.values()),
        }


def train_on(world_size: int, parallel: dict, until: int, **folders: str) -> list[list[float]]:
    """[loss, gradient norm] of every step of `train`."""
    results = launch(train, world_size, parallel, until, folders.get("load"), folders.get("save"))
    parts = zip(*(result["steps"] for result in results), strict=True)
    return [[sum(loss for loss, _ in step), step[0][1]] for step in parts]


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    return launch(train, 1, {}, 3)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, list]:
    """A checkpoint that TP2+SP wrote after two of three steps, and these steps."""
    folder = str(tmp_path_factory.mktemp("lora"))
    return folder, train_on(2, TP2_SP, 3, save=folder)


def test_training_starts_from_the_base_and_learns(uninterrupted):
    [base] = launch(run, 1, ONE_PROCESS, tiny_model())
    losses = [loss for loss, _ in uninterrupted["steps"]]
    assert losses[0] == pytest.approx(base["loss"], rel=1e-6)
    assert losses[2] < losses[1] < losses[0]


def test_frozen_weights_cost_no_gradient_and_no_optimizer_state(uninterrupted):
    assert uninterrupted["moments"] == uninterrupted["trained"]
    assert uninterrupted["trained"] <= uninterrupted["buffered"] < 1.1 * uninterrupted["trained"]  # padding


def test_steps_and_gradient_norm_do_not_depend_on_the_layout(uninterrupted, saved):
    """The first norm also shows that A is drawn alike, the second that each factor is counted once."""
    for found, expected in zip(saved[1][:2], uninterrupted["steps"][:2], strict=True):
        assert found == pytest.approx(list(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, {}), pytest.param(2, VPP2, marks=pytest.mark.slow)], ids=["one", "vpp2"]
)
def test_checkpoint_of_tp2sp_continues_in_another_layout(world_size, parallel, saved):
    folder, steps = saved
    assert read_lora_config(folder) == ALL
    [third] = train_on(world_size, parallel, 3, load=folder)
    assert third == pytest.approx(steps[2], rel=1e-5)


@pytest.fixture
def job(tmp_path):
    """`job(*overrides, world_size=1)`: losses of the training loop, with adapters on trained weights."""
    write_run(tmp_path)
    train_rank(str(tmp_path / "run.yaml"), 1, ["training.stop_at_iteration=1"])
    sections = yaml.safe_load((tmp_path / "run.yaml").read_text())
    sections["checkpoint"] = {"path": str(tmp_path / "adapters"), "load": str(tmp_path / "run")}
    sections["lora"] = {"rank": 2}
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(sections))

    def run(*overrides: str, world_size: int = 1) -> list[float]:
        arguments = str(tmp_path / "lora.yaml"), world_size, list(overrides)
        launch(train_rank, world_size, *arguments) if world_size > 1 else train_rank(*arguments)
        return [m.loss for m in read_metrics(tmp_path / "adapters" / "logs" / "metrics.jsonl")]

    return run


def test_a_run_with_a_lora_section_resumes_in_another_layout(job, tmp_path):
    whole = job("training.stop_at_iteration=4")
    shutil.rmtree(tmp_path / "adapters")
    job("training.stop_at_iteration=2")
    tensor_parallel = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    resumed = job("training.stop_at_iteration=4", *tensor_parallel, world_size=2)
    assert resumed == pytest.approx(whole, rel=1e-4)
    assert whole[3] < whole[0]
    for override, message in (
        ("lora.rank=4", r"adapters: its LoRA adapters are \(rank 2, .*the run's lora section wants \(rank 4"),
        ("lora=null", r"adapters: its LoRA adapters are \(rank 2, .*wants \(none\)"),
        ("optimizer.trainable=[connector]", "lora trains the language model through its adapters"),
    ):
        with pytest.raises(UserError, match=message):
            load_run_config(tmp_path / "lora.yaml", [override], world_size=1)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rank": 0}, "lora.rank is 0: must lie between 1 and"),
        ({"alpha": -1}, "lora.alpha is -1.0: must lie between"),
        ({"dropout": 0.05}, "lora.dropout is 0.05: must be 0.0 or left out"),
        ({"target_modules": []}, "lora.target_modules is empty"),
        ({"target_modules": ["gate_projj"]}, "did you mean 'gate_proj'"),
    ],
)
def test_wrong_settings_are_refused(section, message):
    with pytest.raises(UserError, match=message):
        from_dict(LoraConfig, section, "lora")


def test_run_files_of_0_1_0_say_their_dropout():
    assert from_dict(LoraConfig, {"rank": 2, "dropout": 0}, "lora") == LoraConfig(rank=2)
    assert "dropout" not in to_dict(LoraConfig())


def test_order_of_targets_does_not_matter_and_other_adapters_are_refused():
    check_same_lora(SOME, LoraConfig(rank=2, target_modules=["up_proj", "o_proj", "k_proj"]), "C")
    with pytest.raises(
        UserError, match=r"^C: its LoRA adapters are \(none\), the run's .*\(rank 3, alpha 6, q_"
    ):
        check_same_lora(ALL, None, "C")

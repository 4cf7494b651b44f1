"""Runs of a model with experts: the same losses and auxiliary losses in every layout."""

import shutil

import pytest

from megatron_eagle.training.monitoring.metrics import StepMetrics
from tests.training.test_training_loop import job  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

STEPS = 3
MODEL = ["model.text.model_type=qwen3_moe", f"training.stop_at_iteration={STEPS}"]
EP2, TP2_SP = {"expert_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2, PP2 = {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
WHOLE = {"expert_tensor_parallel_size": 1}


def experts(coefficient: float) -> str:
    sizes = "num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 48"
    return f"model.text.experts={{{sizes}, router_aux_loss_coef: {coefficient}}}"


@pytest.fixture
def trained(job):  # noqa: F811
    """Metrics of a new run, by coefficient, layout and further settings."""

    def run(coefficient: float, world_size: int, parallel: dict, *more: str) -> list[StepMetrics]:
        layout = [f"parallel.{name}={str(value).lower()}" for name, value in parallel.items()]
        steps = job(*MODEL, experts(coefficient), *layout, *more, world_size=world_size)
        shutil.rmtree(job.root)
        assert len(steps) == STEPS
        return steps

    return run


def test_layouts_train_as_one_process(trained):
    one = trained(1.0, 1, {})
    assert all(2 < step.aux_loss < 8 for step in one)
    for world_size, parallel, *more in [
        (2, EP2),
        (2, EP2 | TP2_SP | WHOLE),
        (4, EP2 | TP2_SP),
        (2, TP2_SP),
        (2, EP2 | CP2, "recompute.language=full"),
        (4, EP2 | VPP2),
        (2, EP2, "data.packs_per_sequence=2"),
    ]:
        for there, here in zip(one, trained(1.0, world_size, parallel, *more), strict=True):
            where = (parallel, *more)
            assert here.loss == pytest.approx(there.loss, rel=1e-5), where
            assert here.aux_loss == pytest.approx(there.aux_loss, rel=1e-5), where
            assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-4), where


def test_the_logged_losses_are_without_the_coefficient(trained):
    """Which then moves the routers: the first step's are the same, later ones are not."""
    weak, strong = trained(0.01, 1, {}), trained(3.0, 1, {})
    assert (weak[0].loss, weak[0].aux_loss) == (strong[0].loss, strong[0].aux_loss)
    assert weak[0].grad_norm < strong[0].grad_norm
    assert strong[-1].aux_loss < weak[-1].aux_loss
    for none in (trained(0.0, 1, {}), trained(1.0, 1, {}, "optimizer.freeze_router=true")):
        assert {step.aux_loss for step in none} == {None}

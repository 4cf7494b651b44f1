"""Faults put into the code that is rehearsed, in the ranks' processes: each is found, with its place."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_eagle.rehearsal.matching import Trace, match_messages
from megatron_eagle.rehearsal.packs import MadeUp
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.session import Job, run_jobs
from megatron_eagle.training.run_config import RunConfig
from tests.parallel.cases import cell
from tests.rehearsal.runs import replace_in, small_run


def nothing() -> None:
    """The code as it is."""


def index_on_host() -> None:
    from megatron_eagle.model import inputs

    original = inputs.InputPlan.to

    def to(self: Any, device: torch.device) -> Any:
        moved = original(self, device)
        return replace(moved, vision=replace(moved.vision, rows=self.vision.rows))

    inputs.InputPlan.to = to  # type: ignore[method-assign]


def features_of_another_type() -> None:
    from megatron_eagle.model import eagle

    original = eagle.exchange_features
    eagle.exchange_features = lambda features, share: original(features, share).float()  # type: ignore


def a_feature_less() -> None:
    from megatron_eagle.context_parallel import attention

    original = attention.CoreAttention.forward
    attention.CoreAttention.forward = lambda self, *a, **k: original(self, *a, **k)[..., 1:]  # type: ignore


def strides_that_a_kernel_does_not_read() -> None:
    from eagle_kernels import rms_norm

    rms_norm.as_rows = lambda x: x.reshape(-1, x.shape[-1]).t().contiguous().t()


def a_look_at_the_loss() -> None:
    from megatron_eagle.training import schedule

    original = schedule.megatron_loss

    def look(losses: torch.Tensor, *rest: Any) -> Any:
        if losses.sum().item() < 0:
            raise ValueError("not a loss")
        return original(losses, *rest)

    schedule.megatron_loss = look


def an_operator_without_a_fake_kernel() -> None:
    from megatron_eagle.training import schedule

    library = torch.library.Library("rehearsal_test", "FRAGMENT")
    library.define("unknown(Tensor x) -> Tensor")
    library.define("several(Tensor x) -> (Tensor, Tensor[], int)")

    @torch.library.custom_op("rehearsal_test::python", mutates_args=())
    def python(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    original = schedule.megatron_loss

    def through(losses: torch.Tensor, *rest: Any) -> Any:
        with torch.no_grad():
            torch.ops.rehearsal_test.unknown(losses)
            python(losses)
            one, (other,), count = torch.ops.rehearsal_test.several(losses)
            one[:count].add_(other[:count])
        return original(losses, *rest)

    schedule.megatron_loss = through
    an_operator_without_a_fake_kernel.library = library  # type: ignore[attr-defined]  # it must live on


def memory_that_nobody_gives_back() -> None:
    from megatron_eagle.training import schedule

    kept: list[torch.Tensor] = []
    original = schedule.megatron_loss

    def keep(losses: torch.Tensor, *rest: Any) -> Any:
        kept.append(torch.empty(100 << 20, dtype=torch.uint8, device=losses.device))
        return original(losses, *rest)

    schedule.megatron_loss = keep


def the_largest_loss() -> None:
    """Where losses, in fp64, are to be summed."""
    original, largest = torch.distributed.all_reduce, torch.distributed.ReduceOp.MAX

    def all_reduce(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if x.dtype == torch.float64:
            return original(x, largest)
        return original(x, *rest, **named)

    torch.distributed.all_reduce = all_reduce


def all_to_the_first_experts() -> None:
    """A router that is not even, on one rank."""
    from megatron_eagle.rehearsal import values

    values.even_choice = lambda rows, k, _among: torch.arange(k).expand(rows, k)


def much_on_stderr() -> None:
    """More than a pipe holds."""
    sys.stderr.write("a warning\n" * 20_000)
    sys.stderr.flush()


def killed() -> None:
    """As the system does when memory is full, while others talk."""
    sys.stderr.write("a warning\n")
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = (
    nothing,
    killed,
    much_on_stderr,
    index_on_host,
    features_of_another_type,
    a_feature_less,
    strides_that_a_kernel_does_not_read,
    a_look_at_the_loss,
    an_operator_without_a_fake_kernel,
    memory_that_nobody_gives_back,
)


def _one_layer() -> RunConfig:
    config = small_run({})
    return replace_in(
        config, model=replace(config.model, text=replace(config.model.text, num_hidden_layers=1))
    )


@pytest.fixture(scope="module")
def found() -> dict[Callable[[], None], RankReport]:
    config = _one_layer()
    loader = MadeUp(config.model, ("one document",))
    jobs = [Job(config, "h100", 0, 1, loader, 1, fault) for fault in FAULTS]
    return dict(zip(FAULTS, run_jobs(jobs, 2), strict=True))


Found = dict[Callable[[], None], RankReport]


def syncs(report: RankReport) -> int:
    return sum(s[4] for s in report.syncs if s[0] == "forward and backward")


def test_nothing_is_found_where_nothing_is(found: Found) -> None:
    report = found[nothing]
    assert report.failure is None
    assert not report.problems
    assert syncs(report) == 1  # the loss, once a step


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (index_on_host, "same device"),
        (a_feature_less, "same reduction dim"),
    ],
)
def test_what_a_gpu_refuses_stops_the_rank(fault: Callable[[], None], words: str, found: Found) -> None:
    failure = found[fault].failure
    assert failure is not None
    assert words in failure


@pytest.mark.parametrize(
    ("fault", "words", "where"),
    [
        (features_of_another_type, "mixed types torch.bfloat16, torch.float32", "model/eagle.py"),
        (strides_that_a_kernel_does_not_read, "has strides", "rms_norm.py"),
        (an_operator_without_a_fake_kernel, "rehearsal_test.unknown", "megatron/core/pipeline_parallel"),
        (an_operator_without_a_fake_kernel, "rehearsal_test.python", "megatron/core/pipeline_parallel"),
        (an_operator_without_a_fake_kernel, "rehearsal_test.several", "megatron/core/pipeline_parallel"),
    ],
)
def test_problems_have_a_place(fault: Callable[[], None], words: str, where: str, found: Found) -> None:
    report = found[fault]
    assert report.failure is None, report.failure
    assert any(words in what and where in place for what, place, _ in report.problems), report.problems


def test_what_a_rank_says_stops_nobody(found: Found) -> None:
    assert found[much_on_stderr].failure is None
    assert found[much_on_stderr].peak == found[nothing].peak


def test_a_rank_that_is_killed_is_one_that_stops(found: Found) -> None:
    """The others have their reports."""
    assert "killed by SIGKILL" in (found[killed].stopped_by or "")
    assert found[killed].rank == 0


def test_a_wait_is_counted_with_its_place(found: Found) -> None:
    before, after = found[nothing], found[a_look_at_the_loss]
    assert syncs(after) == syncs(before) + 1
    new = set(after.syncs) - set(before.syncs)
    assert [(phase, inside, what) for phase, inside, what, _, _ in new if phase != "evaluation"] == [
        ("forward and backward", True, "a scalar is read")
    ]


def test_memory_that_stays_is_seen(found: Found) -> None:
    """Two steps with one pack each; the second's peak holds both."""
    more = found[memory_that_nobody_gives_back].peaks["optimizer"].nbytes
    assert more - found[nothing].peaks["optimizer"].nbytes == 2 * (100 << 20)


def mismatch_by(fault: Callable[[], None], config: RunConfig) -> str:
    """What is said of the second of two ranks with this fault; without it their messages meet."""
    loader = MadeUp(config.model, ("one document",))
    befores = nothing, nothing, fault
    jobs = [Job(config, "h100", min(n, 1), 2, loader, 1, before) for n, before in enumerate(befores)]
    first, second, other = (Trace(report.events, report.families) for report in run_jobs(jobs, 2))
    assert match_messages({0: first, 1: second}) is None
    return str(match_messages({0: first, 1: other}))


@pytest.mark.slow
def test_a_rank_whose_code_reduces_otherwise_is_named() -> None:
    mismatch = mismatch_by(the_largest_loss, _one_layer())
    assert "rank 0: all_reduce SUM float64" in mismatch
    assert "rank 1: all_reduce MAX float64" in mismatch
    assert "training/forward_backward.py" in mismatch


@pytest.mark.slow
def test_rows_for_experts_that_nobody_awaits_are_named() -> None:
    layout = cell("EP2 x CP2")
    mismatch = mismatch_by(all_to_the_first_experts, small_run(layout.parallel, text=layout.text))
    assert "awaits other rows than rank" in mismatch
    assert "rank 0: all_to_all" in mismatch and "EXPERT_MODEL_PARALLEL_GROUP" in mismatch

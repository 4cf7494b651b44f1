"""`bench.py rehearsal_sweep`: what it covers, what is a problem, and that it goes on where it was."""

import importlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.rehearsal.formula import MARGIN
from megatron_eagle.rehearsal.memory import Peak
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.rehearsal import Rehearsal, RehearsalPlan
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.stage_settings import stage_settings
from tests.paths import REPO
from tests.rehearsal.budgets import SYNCS

QWEN3 = REPO / "examples" / "qwen3"


@pytest.fixture(scope="module")
def sweep() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPO / "tools"))
    from benchmarks import rehearsal_sweep

    yield rehearsal_sweep
    sys.path.remove(str(REPO / "tools"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def runs(sweep: ModuleType) -> list[RunConfig]:
    return [case.config for case in sweep.CASES]


def values(runs: list[RunConfig], section: str, name: str) -> set[Any]:
    return {getattr(getattr(run, section), name) for run in runs}


def test_every_stage_and_twelve_other_layouts(sweep: ModuleType) -> None:
    stages = set(stage_settings(str(REPO / "examples" / "eagle2.5-8b" / "progressive.yaml"), []))
    assert {case.stage for case in sweep.CASES if not case.overrides} == stages
    others = [case for case in sweep.CASES if case.overrides]
    assert len(others) >= 12
    assert len({case.name for case in sweep.CASES}) == len(sweep.CASES)
    assert max(case.gpus for case in sweep.CASES) >= 1024


@pytest.mark.parametrize(
    ("section", "name"),
    [("parallel", "vision_sharding"), ("recompute", "language"), ("recompute", "vision")],
)
def test_every_allowed_value(section: str, name: str, runs: list[RunConfig]) -> None:
    of = {"parallel": ParallelConfig, "recompute": RecomputeConfig}[section]
    assert values(runs, section, name) == set(get_args(get_type_hints(of)[name]))


def test_every_stage_of_qwen3s_files(sweep: ModuleType) -> None:
    module = importlib.import_module("benchmarks.rehearsal_qwen3")
    cases, its_own = module.CASES, dict(module.FILES.values())  # file -> its GPUs
    assert set(its_own) == {f"qwen3/{each.name}" for each in QWEN3.iterdir()}
    for file, gpus in its_own.items():
        stages = [case.stage for case in cases if (case.file, case.gpus) == (file, gpus)]
        assert stages == list(stage_settings(str(QWEN3.parent / file), []))
        assert 256 in {case.gpus for case in cases if case.file == file}
    assert any(case.has_to_wait for case in cases), "experts"


def test_what_else_the_cases_have(runs: list[RunConfig]) -> None:
    assert values(runs, "recompute", "recompute_modules") >= {(), ("mlp",), ("core_attn", "mlp")}
    switches = ("overlap_param_gather", "align_param_gather", "batch_p2p_sync", "overlap_grad_reduce")
    assert all(True in values(runs, "parallel", name) for name in switches)
    assert False in values(runs, "parallel", "grad_reduce_in_fp32")
    assert any(run.parallel.pipeline_model_parallel_layout for run in runs)
    assert any(run.parallel.num_layers_in_last_pipeline_stage for run in runs)
    assert any(run.parallel.num_model_chunks > 1 for run in runs)
    assert any(run.parallel.key_comm == "ring" and run.parallel.ulysses_parallel_size > 1 for run in runs)
    assert any(run.parallel.ring_node_size > 1 for run in runs)
    assert any(run.lora for run in runs)
    assert any("language" not in run.optimizer.trainable for run in runs)
    assert (4, 2**20) in {(run.data.packs_per_sequence, run.data.sequence_length) for run in runs}


@pytest.mark.parametrize("name", ["rehearsal_sweep", "rehearsal_qwen3"])
def test_the_card(sweep: ModuleType, name: str) -> None:
    file = {"rehearsal_sweep": "rehearsal"}.get(name, name)
    card = json.loads((REPO / "examples" / "cards" / f"{file}.json").read_text(encoding="utf-8"))
    rows = {row["case"]: row for row in card["rows"]}
    cases = importlib.import_module(f"benchmarks.{name}").CASES
    assert list(rows) == [case.name for case in cases]
    for case in cases:
        row = rows[case.name]
        assert (row["gpus"], row["gpu"], row["ranks matched"]) == (case.gpus, case.gpu, case.gpus)
        assert row["problems"] == 0 and card["problems"][case.name] == []
        assert 0 < row["peak GB"] <= (1 + MARGIN) * row["formula GB"]
        assert row["waits a microbatch"] == 0 or case.has_to_wait
        assert row["waits a step"] <= SYNCS["once a step"]
        assert card["waits of the host"][case.name] and card["messages"][case.name]


def reported(plan: RehearsalPlan, nbytes: int) -> Rehearsal:
    report = RankReport(0, 1, 1.0, peaks={"optimizer": Peak(nbytes)})
    report.syncs = [("optimizer", False, "a scalar is read", "optimizer.py:1 step", 2)]
    return Rehearsal(plan, [report], [], None)


def test_a_case_that_is_done_is_kept(
    sweep: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def rehearse(plan: RehearsalPlan, _processes: int) -> Rehearsal:
        ran.append(plan)
        return reported(plan, 5 * 10**9)

    monkeypatch.setattr(sweep, "rehearse", rehearse)
    monkeypatch.setattr(sweep, "code_hash", lambda: "a line")
    first = sweep.run(kept=str(tmp_path), case="1B on L40S")
    assert len(ran) == 1
    again = sweep.run(kept=str(tmp_path), case="1B on L40S")
    assert len(ran) == 1
    assert (again.rows, again.details) == (first.rows, first.details)
    one, two = capsys.readouterr().err.splitlines()
    assert "1 of 1, 1B on L40S" in one and "0 problems, 5.00 GB of" in one
    assert two.endswith(", kept") and not one.endswith(", kept")
    assert first.details["waits of the host"]["1B on L40S, data parallel alone"][0]["times"] == 2
    monkeypatch.setattr(sweep, "code_hash", lambda: "another line")
    sweep.run(kept=str(tmp_path), case="1B on L40S")
    assert len(ran) == 2


def test_a_wait_in_every_microbatch_is_a_problem(sweep: ModuleType) -> None:
    for case in sweep.CASES:
        if case.gpu == "l40s" or case.has_to_wait:
            found = reported(case.plan(), 1)
            found.reports[0].syncs.append(("forward and backward", True, "nonzero", "loss.py:1 f", 1))
            problems = sweep.describe(case, found, 1.0)["problems"]
            assert problems == ([] if case.has_to_wait else ["the host waits 1 times a microbatch"])


def test_too_much_memory_is_a_problem(sweep: ModuleType) -> None:
    case = next(case for case in sweep.CASES if case.gpu == "l40s")
    plan, found = case.plan(), []
    formula = sweep.describe(case, reported(plan, 1), 1.0)["row"]["formula GB"]
    for share in (1.0, 1.02, 1.04, 10.0):
        found.append(sweep.describe(case, reported(plan, int(share * formula * 1e9)), 1.0)["problems"])
    assert [len(problems) for problems in found] == [0, 0, 1, 2]
    assert "and the planner's formula says" in found[2][0]
    assert "do not fit into" in found[3][0]


def test_a_case_that_is_not_there(sweep: ModuleType) -> None:
    with pytest.raises(UserError, match="ring of MoE: no case has that in its name; there are: stage1"):
        sweep.run(case="ring of MoE")


def test_the_code_hash_is_of_all_code(
    sweep: ModuleType, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("megatron_eagle", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("")
    monkeypatch.setattr(sweep, "REPO", tmp_path)
    hashes = [sweep.code_hash()]
    for name in ("megatron_eagle/a.py", "kernels/b.py"):
        (tmp_path / name).write_text("x = 1\n")
        hashes.append(sweep.code_hash())
    assert all(one != other for one, other in pairwise(hashes))

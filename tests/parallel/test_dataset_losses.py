"""Losses by data set in every kind of layout, against token losses of one process, added up by definition."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from megatron_eagle.training import schedule
from megatron_eagle.training.monitoring.metrics import EvaluationMetrics, StepMetrics, read_metrics
from tests.data.helpers import every_tile
from tests.parallel.harness import launch
from tests.parallel.real_runs import LENGTH, PACKS, train_cells, write_mixture, write_run
from tests.parallel.store_cells import model_for

TOLERANCE = 1e-5
SEED = 1234  # training.seed
LEFT_OUT = 1  # number of a sample in the first global batch
TP2, SP = "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2, CP4 = "parallel.context_parallel_size=2", "parallel.context_parallel_size=4"
U2 = "parallel.ulysses_parallel_size=2"
FUSED, PLAIN = "layers.loss=fused", "layers.loss=plain"
CELLS = {
    "tp2-sp-cp2-fused": [TP2, SP, CP2, "parallel.vision_sharding=cp_tp", FUSED],
    "pp2-vpp2-dp2-lora": [PP2, VPP2, "lora.rank=2", PLAIN],
    "packs2-cp2": [CP2, "data.packs_per_sequence=2", PLAIN],
}
MORE_CELLS = {
    "ulysses2-cp2": [CP4, U2, PLAIN],
    "tp4-sp": ["parallel.tensor_model_parallel_size=4", SP, FUSED],
    "tp2-dp2": [TP2, PLAIN],
    "pp4": ["parallel.pipeline_model_parallel_size=4", FUSED],
    "pp2-cp2-fused": [PP2, CP2, FUSED],
    "cp4-zigzag": [CP4, "parallel.context_parallel_layout=zigzag", PLAIN],
    "cp4-padded": [
        CP4,
        "parallel.context_parallel_layout=zigzag_per_document",
        "parallel.pad_documents=true",
        FUSED,
    ],
    "dp4-overlapped": ["parallel.overlap_grad_reduce=true", FUSED],
    "tp2-sp-pp2-vpp2-lora": [TP2, SP, PP2, VPP2, "lora.rank=2", FUSED],
    "tp2-ulysses2": [TP2, CP2, U2, FUSED],
    "packs2-dp2": ["data.packs_per_sequence=2", FUSED],
    "packs4-lora": ["data.packs_per_sequence=4", "lora.rank=2", FUSED],
    "packs2-pp2": ["data.packs_per_sequence=2", PP2, FUSED],
    "packs2-tp2-sp": ["data.packs_per_sequence=2", TP2, SP, FUSED],
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A folder with a training store, a held-out store whose data sets have other names, and a run's file."""
    folder = tmp_path_factory.mktemp("mixture")
    store = write_mixture(folder / "training")
    held_out = write_mixture(folder / "held-out", names=("text", "stills", "films", "single"))
    write_run(
        folder / "run.yaml",
        store,
        optimizer={"lr": 1e-30, "weight_decay": 0.0},  # every iteration has the first one's weights
        training={"stop_at_iteration": 2},
        evaluation={"data": str(held_out), "interval": 2, "batches": 2},
    )
    return folder


def token_losses(store: str, batches: int) -> list[dict[int, list[float]]]:
    """Of the first global batches, in one process: per store row the losses of its supervised tokens."""
    eagle, samples = model_for(store), SampleStore(store, LENGTH)
    loader = PackLoader(
        DataConfig(store, LENGTH, prefetch=False),
        global_batch_size=PACKS,
        data_parallel_rank=0,
        data_parallel_size=1,
        plan=every_tile,
    )
    found = []
    with model_parallel(ParallelConfig()) as mesh, torch.no_grad():
        [model] = build_model(eagle, mesh, torch.device("cpu"))
        initialize_parameters([model], SEED)
        for number in range(batches):
            found.append({})
            for pack in loader.step(number * PACKS).microbatches:
                planned = replace(pack, plan=schedule.plan_batch(eagle, mesh, False, pack))
                inputs = schedule.build_batch(torch.device("cpu"), planned)
                losses = model(inputs)[0].double()
                for row, start in zip(pack.sample_rows, pack.document_bounds, strict=False):
                    supervised = torch.from_numpy(samples[row].answers[1:] > 0)
                    found[-1][row] = losses[start : start + len(supervised)][supervised].tolist()
    loader.close()
    return found


@pytest.fixture(scope="module")
def losses(mixture) -> dict[str, list[dict[int, list[float]]]]:
    return {
        name: launch(token_losses, 1, str(mixture / name / "store"), batches)[0]
        for name, batches in (("training", 2), ("held-out", 2))
    }


def expected(store: Path, by_row: dict[int, list[float]]) -> dict[str, tuple]:
    """Name -> loss, share and tokens, by the definition; every supervised token weighs 1 / sqrt(n)."""
    samples = SampleStore(store, LENGTH)
    lost, weight, tokens = defaultdict(float), defaultdict(float), defaultdict(int)
    for row, of_tokens in by_row.items():
        name = samples.manifest.datasets[samples[row].source]
        lost[name] += sum(of_tokens) / len(of_tokens) ** 0.5
        weight[name] += len(of_tokens) ** 0.5
        tokens[name] += samples[row].n_tokens
    total = sum(weight.values())
    return {
        name: (lost[name] / weight[name], weight[name] / total, tokens[name]) if weight[name] else (None,) * 3
        for name in samples.manifest.datasets
    }


def reported(record: StepMetrics | EvaluationMetrics) -> dict[str, tuple]:
    kind = "" if isinstance(record, StepMetrics) else "evaluation_"
    parts = [getattr(record, f"{kind}{what}_by_dataset") for what in ("loss", "share", "tokens")]
    assert parts[0].keys() == parts[1].keys() == parts[2].keys()
    return {name: tuple(part[name] for part in parts) for name in parts[0]}


def check(logs: Path, mixture: Path, losses: dict, left_out: bool) -> None:
    """The records of a run say what the definition says, and their parts add up to the logged loss."""
    first, second, evaluation = read_metrics(logs / "metrics.jsonl")
    kept = dict(losses["training"][0])
    if left_out:
        del kept[list(kept)[LEFT_OUT]]
    training, held_out = mixture / "training" / "store", mixture / "held-out" / "store"
    for record, store, by_row in (
        (first, training, kept),
        (second, training, losses["training"][1]),
        (evaluation, held_out, {row: of for batch in losses["held-out"] for row, of in batch.items()}),
    ):
        found, wanted = reported(record), expected(store, by_row)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert found[name] == (pytest.approx(values, rel=TOLERANCE) if values[0] else values), name
        there = [values for values in found.values() if values[0] is not None]
        whole = record.loss if isinstance(record, StepMetrics) else record.evaluation_loss
        assert sum(share * loss for loss, share, _ in there) == pytest.approx(whole, rel=1e-6)
        assert sum(share for _, share, _ in there) == pytest.approx(1, abs=1e-6)


def run(mixture: Path, cells: dict[str, list[str]]) -> None:
    """Train all cells in the same four processes."""
    launch(
        train_cells,
        4,
        str(mixture / "run.yaml"),
        4,
        [
            ([*overrides, f"checkpoint.path={mixture / name}"], faults(name))
            for name, overrides in cells.items()
        ],
    )


def faults(name: str) -> list[dict]:
    """In some cells one rank loses a sample."""
    bad = {"kind": "bad_media", "iteration": 1, "samples": [LEFT_OUT], "rank": 3}
    return [bad] if "cp2" in name else []


def test_sources_of_one_name_are_one_data_set(mixture):
    manifest = SampleStore(mixture / "training" / "store", LENGTH).manifest
    shared = replace(manifest, sources=["a.jsonl", "b.jsonl", "c.jsonl"], names=["x", "y", "x"])
    assert (shared.datasets, shared.dataset_of_source) == (["x", "y"], [0, 1, 0])
    nameless = replace(shared, names=[])
    assert (nameless.datasets, nameless.dataset_of_source) == (nameless.sources, [0, 1, 2])


def test_the_mixture_has_what_can_go_wrong(mixture, losses):
    samples = SampleStore(mixture / "training" / "store", LENGTH)
    datasets = [{samples[row].dataset for row in batch} for batch in losses["training"]]
    assert datasets == [{0, 1, 3}, {0, 1, 2}], "one is absent in each step"
    assert samples.manifest.datasets == ["chat", "pictures", "clips", "rare"]


def test_the_definition_in_every_layout(mixture, losses):
    run(mixture, CELLS)
    for name in CELLS:
        check(mixture / name / "logs", mixture, losses, left_out=bool(faults(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CELLS)
def test_the_definition_in_more_layouts(mixture, losses, name):
    run(mixture, {name: MORE_CELLS[name]})
    check(mixture / name / "logs", mixture, losses, left_out=bool(faults(name)))


def _train_uncut(*arguments) -> None:
    """Group numbers do not follow the tokens that a rank holds: the first ones of the pack are taken."""

    def build(*args, targets, **more):
        inputs = build_input(*args, targets=targets, **more)
        kept = inputs.targets
        return replace(inputs, targets=replace(kept, group_ids=targets.group_ids[: len(kept.group_ids)]))

    build_input = schedule.build_input
    with patch.object(schedule, "build_input", build):
        train_cells(*arguments)


def test_groups_that_stay_behind_are_noticed(mixture, losses):
    settings = [CP2, PLAIN, f"checkpoint.path={mixture / 'uncut'}", "training.stop_at_iteration=1"]
    launch(_train_uncut, 2, str(mixture / "run.yaml"), 2, [(settings, [])])
    step, _ = read_metrics(mixture / "uncut" / "logs" / "metrics.jsonl")
    found, wanted = reported(step), expected(mixture / "training" / "store", losses["training"][0])
    assert step.loss == pytest.approx(sum(v[0] * v[1] for v in wanted.values() if v[0]), rel=TOLERANCE)
    assert max(abs(found[n][0] / wanted[n][0] - 1) for n in wanted if wanted[n][0]) > 100 * TOLERANCE

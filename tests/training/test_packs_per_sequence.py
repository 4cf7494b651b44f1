"""Packs end to end over one group: runs that go on with another number of them, and what is refused."""

import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.data.loading.loader import PackLoader
from megatron_eagle.data.packing.index import read_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.metrics import EvaluationMetrics, StepMetrics, read_metrics
from megatron_eagle.training.preflight import check_runs
from megatron_eagle.training.run_config import load_run_config
from megatron_eagle.training.train import train
from tests.parallel.harness import launch
from tests.parallel.real_runs import LENGTH, PACKS, write_mixture, write_run

TOLERANCE = 1e-5
PROCESSES = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run's file with held-out data, whose last packs are fewer than a global batch."""
    folder = tmp_path_factory.mktemp("sequences")
    write_run(
        folder / "run.yaml",
        write_mixture(folder / "data"),
        training={"train_iterations": 3},
        checkpoint={"save_interval": 1},
        evaluation={"data": str(write_mixture(folder / "held-out")), "interval": 1},
    )
    assert len(read_packs(SampleStore(folder / "held-out" / "store", LENGTH))) % PACKS
    return folder


def train_recorded(file: str, starts: list[list[str]]) -> list[tuple[int, list[int], list[int]]]:
    """On each rank: one start after the other, of one run. Of each microbatch that is trained on: packs
    consumed before its batch, and the numbers and rows of its samples."""
    step, taken = PackLoader.step, []

    def recording(loader: PackLoader, consumed_packs: int):
        batch = step(loader, consumed_packs)
        if Path(loader.store.path).parent.name == "data":
            for pack in batch.microbatches:
                taken.append((consumed_packs, [s.number for s in pack.samples], pack.sample_rows))
        return batch

    with patch.object(PackLoader, "step", recording):
        for overrides in starts:
            train(load_run_config(file, overrides, world_size=torch.distributed.get_world_size()))
    return taken


def samples(ranks: list[list[tuple[int, list[int], list[int]]]]) -> list[tuple[int, int, int]]:
    """What was trained on, in the global order: packs consumed before the batch, number and row."""
    return sorted(
        {
            (consumed, number, row)
            for consumed, numbers, rows in itertools.chain(*ranks)
            for number, row in zip(numbers, rows, strict=True)
        }
    )


@pytest.mark.slow
def test_a_run_goes_on_with_another_number(made):
    """1, then 2, then 4 packs a sequence: batches, and losses in training and on held-out packs, are those of
    one process from the start to the end."""
    runs = {name: made / name for name in ("one", "several")}
    file = str(made / "run.yaml")
    path = {name: f"checkpoint.path={folder}" for name, folder in runs.items()}
    one = launch(train_recorded, 1, file, [[path["one"]]])
    zigzag = "parallel.context_parallel_layout=zigzag"  # divides documents: keys travel
    starts = [
        [path["several"], zigzag, f"training.stop_at_iteration={stop}", f"data.packs_per_sequence={packs}"]
        for stop, packs in enumerate((1, 2, 4), 1)
    ]
    several = launch(train_recorded, PROCESSES, file, starts)
    assert samples(several) == samples(one)
    sizes = {consumed: len(rows) for consumed, _, rows in several[0]}
    assert len(sizes) == 3 and sizes[2 * PACKS] > sizes[0], "in the end a batch is one microbatch"
    expected, found = (read_metrics(folder / "logs" / "metrics.jsonl") for folder in runs.values())
    assert len(expected) == len(found) == 6
    for there, here in zip(expected, found, strict=True):
        assert type(there) is type(here) and there.iteration == here.iteration
        if isinstance(there, EvaluationMetrics):
            assert here.evaluation_loss == pytest.approx(there.evaluation_loss, rel=TOLERANCE)
            assert here.evaluation_tokens_by_dataset == there.evaluation_tokens_by_dataset
        else:
            assert here.loss == pytest.approx(there.loss, rel=TOLERANCE)
            assert here.grad_norm == pytest.approx(there.grad_norm, rel=TOLERANCE)
            for name in ("first_pack", "packs", "data", "tokens", "samples", "tiles", "frames", "packing"):
                assert getattr(here, name) == getattr(there, name), name
    last = next(m for m in reversed(found) if isinstance(m, StepMetrics))
    assert 0 < last.foreign_keys < 1 and 0 < last.exposed_transfer < 1
    assert found[0].foreign_keys is None is found[0].exposed_transfer, "nobody exchanges keys"


def refusal(made: Path, processes: int, packs: int, *overrides: str) -> str:
    settings = [f"checkpoint.path={made / 'new'}", f"data.packs_per_sequence={packs}", *overrides]
    with pytest.raises(UserError) as caught:
        load_run_config(made / "run.yaml", settings, world_size=processes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CP2, ULYSSES = "parallel.context_parallel_size=2", "parallel.ulysses_parallel_size"
RING = "parallel.context_parallel_comm=ring"


# Processes, packs a sequence, further settings, and what the refusal says.
REFUSED = [
    (8, 3, [CP2], "does not divide 4, the data parallel size of 8 processes with 1: choose 2 or 4"),
    (8, 8, [CP2], "does not divide 4, the data parallel size of 8 processes with 1: choose 4"),
    (3, 2, [CP2], "3 processes cannot hold tensor 1 x pipeline 1 x context 2 = 2: start a multiple of 2"),
    (
        8,
        2,
        ["training.global_batch_size=12"],
        "must be a multiple of the data parallel size 4 x data.packs_per_sequence 2; nearest: 8 or 16",
    ),
    (2, 2, ["parallel.vision_sharding=none"], "data.packs_per_sequence 2: choose cp or cp_tp, or 1 pack"),
    (2, 2, ["layers.attention=te"], "te cannot divide 2 packs over one group: set data.packs_per_sequence=1"),
    (
        2,
        2,
        [f"{ULYSSES}=3"],
        "3 does not divide data.packs_per_sequence 2 x context_parallel_size 1: choose one of its divisors",
    ),
    (
        6,
        2,
        ["parallel.context_parallel_size=3", "parallel.context_parallel_layout=zigzag", RING],
        "data.length 160 must be a multiple of 6 for data.packs_per_sequence 2 x context_parallel_size 3 "
        "(zigzag): the nearest is 162",
    ),
    (
        4,
        4,
        ["parallel.ring_node_size=3", RING],
        "ring_node_size 3 does not divide the 4 ranks that exchange keys (data.packs_per_sequence 4 x "
        "context_parallel_size 1 / ulysses_parallel_size 1): the nearest is 2",
    ),
    (2, 1024, [CP2], "1024 x parallel.context_parallel_size 2 = 2048 context parallel ranks: at most 1024"),
    (1, 0, [], "data.packs_per_sequence is 0: must lie between 1 and 1024"),
]


@pytest.mark.parametrize(("processes", "packs", "overrides", "said"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_does(made, processes, packs, overrides, said):
    assert said in refusal(made, processes, packs, *overrides)


def test_ulysses_divides_heads_over_the_ranks_of_all_packs(made):
    """One rank a pack, and two of the sequence's ranks divide heads; Megatron's word a2a means all."""
    for words in ([f"{ULYSSES}=2"], ["parallel.context_parallel_comm=a2a"]):
        config = load_run_config(made / "run.yaml", ["data.packs_per_sequence=2", *words], world_size=2)
        assert (config.layout.context_parallel_size, config.layout.ulysses_parallel_size) == (2, 2)
        assert config.parallel.context_parallel_size == 1, "the setting stays as written"
    four = ["data.packs_per_sequence=2", CP2, "parallel.context_parallel_comm=a2a"]
    assert load_run_config(made / "run.yaml", four, world_size=4).layout.ulysses_parallel_size == 4


def test_the_check_shows_the_whole_group(made):
    config = load_run_config(made / "run.yaml", ["data.packs_per_sequence=2", CP2], world_size=8)
    [line, *_] = check_runs([config], 8)
    assert ": CP4 x DP2, 2 packs a sequence; 3 iterations of 4 x 160 tokens" in line
    for word, said in (("a2a", "heads over 4 ranks"), ("ring", "keys by ring")):
        settings = ["data.packs_per_sequence=2", CP2, f"parallel.context_parallel_comm={word}"]
        config = load_run_config(made / "run.yaml", settings, world_size=8)
        assert f", 2 packs a sequence, {said}; " in check_runs([config], 8)[0]

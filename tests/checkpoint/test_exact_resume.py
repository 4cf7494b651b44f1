"""A run that ends in the middle of an epoch and of a step, and goes on in a new process: bit for bit."""

import hashlib
import itertools
import json
import os
import random
import signal
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_eagle.checkpoint import checkpoint_folder, read_train_state
from megatron_eagle.checkpoint.manifest import write_manifest
from megatron_eagle.data.loading.loader import PackLoader
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.training import train as training
from megatron_eagle.training.monitoring.metrics import read_metrics
from megatron_eagle.training.resilience.policy import Preempted
from megatron_eagle.training.run_config import load_run_config
from tests.data.helpers import contents, conversation, make_image, make_store, make_tokenizer
from tests.parallel.harness import launch

LENGTH, BATCH, UNTIL = 96, 4, 8
IN_STEP, IN_MICROBATCH = 5, 2  # where a run is interrupted


class WatchedLoader(PackLoader):
    """Writes down, before every global batch, its samples here and all random states of the process."""

    def step(self, consumed_packs):
        batch = super().step(consumed_packs)
        rows = [pack.sample_rows for pack in batch.microbatches]
        line = {"packs": consumed_packs, "rows": rows, "random": random_states()}
        with open(f"{os.environ['WATCHED']}.{self._rank}", "a") as file:
            file.write(json.dumps(line) + "\n")
        return batch


def random_states() -> str:
    """One name for the states of all generators that training could draw from."""
    tracked = sorted(get_cuda_rng_tracker().get_states().items())
    states = [torch.get_rng_state().tolist(), [(name, state.tolist()) for name, state in tracked]]
    states += [random.getstate(), np.random.get_state()[1].tolist()]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def train(config: str, world_size: int, overrides: list[str], watched: str, how: str = "") -> str:
    """On each rank: train to the end or until it is told to stop -> what it said then. `how` the last rank is
    interrupted before a microbatch: by a signal, or killed."""
    run = load_run_config(config, overrides, world_size=world_size)
    forwards, forward = itertools.count(), EagleModel.forward
    per_step = BATCH // run.parallel.data_parallel_size(world_size)
    last = torch.distributed.get_rank() == world_size - 1

    def interrupted(self, *arguments, **settings):
        if next(forwards) == (IN_STEP - 1) * per_step + IN_MICROBATCH - 1 and last:
            os.kill(os.getpid(), signal.SIGUSR1 if how == "signal" else signal.SIGKILL)
        return forward(self, *arguments, **settings)

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"WATCHED": watched}))
        if how:
            stack.enter_context(patch.object(EagleModel, "forward", interrupted))
        try:
            training.train(run, open_loader=WatchedLoader)
        except Preempted as stopped:
            return str(stopped)
    return ""


class Runs:
    """Runs on one small store, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        records = [conversation("Hi", "Yes " * (k + 1)) for k in range(14)]
        for k in range(10):
            make_image(folder / f"{k}.png", (112, 56), seed=k)
            records.append(conversation("<image-1>?", "A cup. " * (k % 4 + 1), image=[f"{k}.png"]))
        self.store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (LENGTH,))
        write_packs(self.store, LENGTH, seed=0)

    def start(self, name: str, *overrides: str, world_size: int = 1, how: str = "") -> set[str]:
        """Train in folder `name`, from what it holds -> what its ranks said."""
        sections = {
            "model": {"preset": "tiny", "vision": {"image_size": 28, "patch_size": 14}},
            "data": {"path": str(self.store), "length": LENGTH},
            "training": {"train_iterations": UNTIL, "global_batch_size": BATCH, "precision": "fp32"},
            "optimizer": {"lr": 5e-3, "lr_warmup_fraction": 0.2},
            "logging": {"progress": False, "tensorboard": False},
            "checkpoint": {"path": str(self.folder / name)},
        }
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(sections))
        watched = str(self.folder / f"{name}.watched")
        return set(launch(train, world_size, str(config), world_size, list(overrides), watched, how))

    def metrics(self, name: str) -> list[tuple]:
        found = read_metrics(self.folder / name / "logs" / "metrics.jsonl")
        return [(m.iteration, m.loss, m.grad_norm, m.lr) for m in found]

    def saved(self, name: str) -> dict:
        """The last checkpoint: tensor files by their bytes, the rest by value; without the run's paths."""
        folder = checkpoint_folder(self.folder / name)
        saved = {name: content for name, content in contents(folder).items() if name.endswith(".distcp")}
        common = torch.load(folder / "common.pt", weights_only=True)
        return saved | {"common": common, "state": read_train_state(self.folder / name)}

    def watched(self, name: str, ranks: int = 1) -> list[dict]:
        """Per iteration, the samples of all ranks and the random states, as the last attempt had them."""
        steps = {}
        for rank in range(ranks):
            for text in Path(self.folder, f"{name}.watched.{rank}").read_text().splitlines():
                line = json.loads(text)
                steps.setdefault(line["packs"], {})[rank] = line
        return [steps[packs] for packs in sorted(steps)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("resume"))
    runs.start("clean")
    return runs


def test_the_run_crosses_an_epoch_and_draws_no_random_numbers(runs):
    """Why there is no random state in a checkpoint."""
    packs = len({tuple(rows) for step in runs.watched("clean") for rows in step[0]["rows"]})
    assert packs % BATCH and IN_STEP * BATCH % packs and packs < UNTIL * BATCH
    assert len({step[0]["random"] for step in runs.watched("clean")}) == 1


def test_a_drawn_number_would_be_seen():
    """Negative control of what the test above watches."""
    before = random_states()
    torch.rand(1)
    assert random_states() != before


@pytest.mark.parametrize(
    ("how", "overrides", "said", "goes_on_after"),
    [
        ("signal", [], f"stopped by a signal after iteration {IN_STEP}, which is saved", IN_STEP),
        ("kill", ["checkpoint.save_interval=2", "checkpoint.async_save=true"], None, IN_STEP - 1),
    ],
    ids=["signal", "kill"],
)
def test_interrupted_between_microbatches(how, overrides, said, goes_on_after, runs):
    """A signal lets the step finish; a kill discards it. Either way the run ends as the clean one."""
    if how == "kill":
        with pytest.raises(RuntimeError, match="ended without a result"):
            runs.start(how, *overrides, how=how)
    else:
        assert runs.start(how, *overrides, how=how) == {said}
    assert read_train_state(runs.folder / how).iteration <= goes_on_after
    assert runs.start(how, *overrides) == {""}
    assert runs.metrics(how) == runs.metrics("clean") and len(runs.metrics(how)) == UNTIL
    assert runs.saved(how) == runs.saved("clean")
    assert runs.watched(how) == runs.watched("clean")


def test_packs_read_twice_would_be_seen(runs):
    """Negative control: a checkpoint whose data position is one step behind."""
    runs.start("behind", f"training.stop_at_iteration={IN_STEP}")
    folder = checkpoint_folder(runs.folder / "behind")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"consumed_packs": (IN_STEP - 1) * BATCH}))
    write_manifest(folder, {})
    runs.start("behind")
    assert runs.metrics("behind")[:IN_STEP] == runs.metrics("clean")[:IN_STEP]
    assert runs.metrics("behind") != runs.metrics("clean")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, []),
        (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        (4, ["parallel.context_parallel_size=2"]),
    ],
    ids=["dp2", "tp2sp", "cp2dp2"],
)
def test_interrupted_on_several_ranks(world_size, layout, runs):
    whole, parts = f"whole-{world_size}{len(layout)}", f"parts-{world_size}{len(layout)}"
    runs.start(whole, *layout, world_size=world_size)
    (said,) = runs.start(parts, *layout, "checkpoint.async_save=true", world_size=world_size, how="signal")
    assert said == f"stopped by a signal after iteration {IN_STEP}, which is saved"
    runs.start(parts, *layout, world_size=world_size)
    assert runs.metrics(parts) == runs.metrics(whole) and runs.saved(parts) == runs.saved(whole)


@pytest.mark.slow
def test_the_data_order_does_not_change_with_the_layout(runs):
    """Four processes, then two, in the middle of an epoch: the same packs in every global batch."""
    tp2, pp2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
    runs.start("moved", tp2, f"training.stop_at_iteration={IN_STEP}", world_size=4)
    first = runs.watched("moved", ranks=2)
    for rank in range(2):
        Path(runs.folder, f"moved.watched.{rank}").unlink()
    runs.start("moved", pp2, world_size=2)
    order = [sorted(map(tuple, sum((line["rows"] for line in step.values()), []))) for step in first]
    order += [sorted(map(tuple, step[0]["rows"])) for step in runs.watched("moved")]
    clean = [sorted(map(tuple, step[0]["rows"])) for step in runs.watched("clean")]
    assert order == clean
    moved, expected = np.array(runs.metrics("moved")), np.array(runs.metrics("clean"))
    np.testing.assert_allclose(moved[IN_STEP, 1:3], expected[IN_STEP, 1:3], rtol=1e-5)
    np.testing.assert_allclose(moved[:, 1], expected[:, 1], rtol=1e-3)

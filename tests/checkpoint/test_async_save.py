"""Saves in the background: the same bytes, one at a time, waited for, reported, and safe to kill."""

import errno
import os
import threading
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.checkpoint import CheckpointConfig, CheckpointSaver, TrainState, read_train_state
from megatron_eagle.checkpoint import saver as saver_module
from megatron_eagle.checkpoint.files import HostCopy
from megatron_eagle.runtime import agreement
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.checkpoint.steps import EAGLE, build, save_killed, steps
from tests.data.helpers import contents
from tests.parallel.harness import launch

TP2 = {"tensor_model_parallel_size": 2}


class Run:
    """A model and its optimizer on this rank, and a saver under test."""

    def __init__(self, mesh):
        self.mesh = mesh
        _, self.wrapped, self.optimizer, self.scheduler = build(EAGLE, mesh, seed=1)
        for model in self.wrapped:
            for buffer in model.buffers:
                buffer.grad_data.fill_(0.01)
        self.optimizer.step()
        self.messages = []

    def saver(self, root, **settings):
        return CheckpointSaver(CheckpointConfig(str(root), **settings), self.messages.append)

    def save(self, saver, iteration, **settings):
        arguments = (self.wrapped, self.optimizer, self.scheduler, {"model": {}}, TrainState(iteration, 3))
        saver.save(*arguments, **settings)

    def spoil(self):
        """Change everything that a checkpoint holds, in place."""
        for group in self.optimizer.param_groups:
            group["lr"] = 7.0
        for model in self.wrapped:
            for parameter in model.parameters():
                parameter.data.fill_(7)
        (distributed,) = self.optimizer.chained_optimizers
        for state in distributed.optimizer.state.values():
            for value in state.values():
                value.fill_(7)
        self.scheduler.step(5)


@contextmanager
def run_here(parallel=None):
    """A `Run` on one process, or on this one of several."""
    device = Device("cpu")
    with device.context(), process_group(device), model_parallel(ParallelConfig(**parallel or {})) as mesh:
        yield Run(mesh)


class Gate:
    """Holds the background writer back until it is opened."""

    def __init__(self, write=saver_module.write_snapshot):
        self._open, self._write = threading.Event(), write
        self.threads = []

    def open(self):
        self._open.set()

    def __call__(self, *arguments):
        assert self._open.wait(60)
        self.threads.append(threading.current_thread())
        return self._write(*arguments)


def save_both_ways(root: str, copy: bool) -> None:
    """On each rank: the same state blocking and asynchronous, where all of it changes once `save` is back."""
    with run_here(TP2) as run:
        with run.saver(f"{root}/blocking") as saver:
            run.save(saver, 1)
        gate = Gate()
        fill = HostCopy.fill if copy else lambda _, pieces: pieces
        with (
            patch.object(saver_module, "write_snapshot", gate),
            patch.object(HostCopy, "fill", fill),
            run.saver(f"{root}/async", async_save=True) as saver,
        ):
            run.save(saver, 1)
            run.spoil()
            gate.open()


def test_content_is_that_of_a_blocking_save(tmp_path):
    launch(save_both_ways, 2, str(tmp_path), True)
    blocking, background = (contents(tmp_path / kind) for kind in ("blocking", "async"))
    assert "iter_0000001/__1_0.distcp" in blocking and "iter_0000001/manifest.json" in blocking
    assert background == blocking


def test_a_missing_copy_would_be_seen(tmp_path):
    """Negative control: written from the training's own memory."""
    launch(save_both_ways, 2, str(tmp_path), False)
    blocking, background = (contents(tmp_path / kind) for kind in ("blocking", "async"))
    assert {name for name in blocking if background[name] != blocking[name]} >= {
        "iter_0000001/__0_0.distcp",
        "iter_0000001/__1_0.distcp",
    }


def test_one_save_at_a_time_in_one_piece_of_memory(tmp_path):
    gate = Gate()
    with run_here() as run, run.saver(tmp_path, async_save=True, keep_last=1) as saver:
        with patch.object(saver_module, "write_snapshot", gate):
            run.save(saver, 1)
            threading.Timer(0.3, gate.open).start()
            run.save(saver, 2)
            held = saver._copy.nbytes
        saver.wait()
        run.save(saver, 3)
    memory, first, waited, *rest = run.messages
    file = tmp_path / "iter_0000003" / "__0_0.distcp"
    assert 0.8 * file.stat().st_size < held == saver._copy.nbytes < file.stat().st_size
    assert memory == f"asynchronous saves hold {held / 1e9:.3f} GB of host memory here"
    assert first == f"saved iteration 1 in {tmp_path}"
    assert waited.startswith("the save of iteration 2 waited 0.") and "for that of iteration 1" in waited
    assert rest == [f"saved iteration {i} in {tmp_path}" for i in (2, 3)]
    assert [path.name for path in tmp_path.glob("*iter_*")] == ["iter_0000003"]


def test_training_takes_part_in_no_collective(tmp_path):
    """All of a save's communication is the background thread's."""
    threads, gather = [], torch.distributed.all_gather_object

    def noted(*arguments, **settings):
        threads.append(threading.current_thread())
        return gather(*arguments, **settings)

    with (
        run_here() as run,
        patch.object(agreement.torch.distributed, "all_gather_object", noted),
        run.saver(tmp_path, async_save=True) as saver,
    ):
        run.save(saver, 1)
        run.save(saver, 2, must_succeed=True)
    main = threading.main_thread()
    assert [thread is main for thread in threads] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["the end", "an error"])
def test_leaving_waits_for_the_save(kind, tmp_path):
    gate = Gate()
    with (
        pytest.raises(ZeroDivisionError) if kind == "an error" else patch.dict({}),
        run_here() as run,
        patch.object(saver_module, "write_snapshot", gate),
        run.saver(tmp_path, async_save=True) as saver,
    ):
        run.save(saver, 5)
        threading.Timer(0.3, gate.open).start()
        if kind == "an error":
            1 / 0  # noqa: B018
    assert read_train_state(tmp_path).iteration == 5


def test_a_failed_write_is_reported_and_a_last_one_raises(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with run_here() as run, run.saver(tmp_path, async_save=True) as saver:
        run.save(saver, 1)
        saver.wait()
        with patch("megatron_eagle.checkpoint.files.torch.save", side_effect=full):
            run.save(saver, 2)
            saver.wait()
            with pytest.raises(AgreedError, match="iteration 3 could not be saved: rank 0: No space left"):
                run.save(saver, 3, must_succeed=True)
        assert saver.saved_iteration == 1
        run.save(saver, 4)
        saver.wait()
        assert saver.saved_iteration == 4
    assert run.messages[2] == (
        f"warning: {tmp_path}: iteration 2 could not be saved: rank 0: No space left on device; "
        "iteration 1 stays the latest checkpoint; training goes on"
    )
    assert not list(tmp_path.glob(".iter*")), "the space is given back"


@pytest.mark.parametrize(
    "points",
    [
        ("middle of a file", "tracker"),
        pytest.param(("before the copy", "tensors", "index", "manifest", "rename"), marks=pytest.mark.slow),
    ],
    ids=["two", "five-more"],
)
def test_a_killed_save_leaves_the_previous_checkpoint(points, tmp_path):
    """A process dies (as by kill -9) while its thread saves iteration 3, at one point after the other."""
    root = str(tmp_path)
    steps(1, {}, until=2, save=root)
    for point in points:
        with pytest.raises(RuntimeError, match="ended without a result"):
            launch(save_killed, 1, EAGLE, root, point, True)
        assert read_train_state(root).iteration == 2, point
    with pytest.raises(RuntimeError, match="ended without a result|failed"):
        launch(save_killed, 2, EAGLE, root, "one rank", True)
    resumed = steps(1, {}, until=3, load=root, save=root)[0]
    assert resumed["start"] == (2, 8) and read_train_state(root).iteration == 3


def test_a_kill_while_old_checkpoints_are_deleted(tmp_path):
    """The new one is complete by then; what was left half-deleted goes with the next."""
    root = str(tmp_path)
    steps(1, {}, until=2, save=root)
    with pytest.raises(RuntimeError, match="ended without a result"):
        launch(save_killed, 1, EAGLE, root, "retention", True)
    assert sorted(path.name for path in tmp_path.glob("*iter_*")) == [
        ".iter_0000002.deleting",
        "iter_0000003",
    ]
    steps(1, {}, until=4, load=root, save=root, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("*iter_*")) == ["iter_0000003", "iter_0000004"]


def test_failures_in_the_background_end_the_run_where_all_ranks_know_of_them(tmp_path):
    """At the next save: until then one rank may have heard of a failure and another not."""

    def full(*_):
        raise AgreedError("no space")

    with run_here() as run, run.saver(tmp_path, async_save=True, max_failed_saves=2) as saver:
        with patch.object(saver_module, "write_snapshot", full):
            run.save(saver, 1)
            run.save(saver, 2)
            saver.wait()
        with pytest.raises(AgreedError, match="2 saves in a row have failed .* no checkpoint is saved"):
            run.save(saver, 3)

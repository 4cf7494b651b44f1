"""Room for a run's checkpoints: how large one will be, and whether they fit."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from megatron_eagle.checkpoint import bytes_to_save, check_space
from megatron_eagle.checkpoint.folder import TrainState
from megatron_eagle.checkpoint.saving import take_snapshot
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import Device, process_group
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.checkpoint.steps import EAGLE, build
from tests.parallel.harness import launch


def sizes(parallel: dict) -> tuple[int, int]:
    """On each rank: what is said before the first step that all ranks will write, and what they do then."""
    device = Device("cpu")
    with device.context(), process_group(device), model_parallel(ParallelConfig(**parallel)) as mesh:
        _, models, optimizer, scheduler = build(EAGLE, mesh, seed=1)
        said = bytes_to_save(models, optimizer)
        pieces = take_snapshot(models, optimizer, scheduler, {}, TrainState(1)).pieces
        both = torch.tensor([said, sum(piece.data.nbytes for piece in pieces)])
        torch.distributed.all_reduce(both)
        return tuple(both.tolist())


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}], ids=["DP2", "TP2"])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(parallel):
    (said, written), other = launch(sizes, 2, parallel)
    assert said == written > 10**6 and other == (said, written)


@pytest.mark.parametrize(
    ("keep_last", "saves", "free"),
    [(None, 9, 100), (1, 9, 100), (3, 9, 300), (3, 2, 200), (10**6, 1, 100)],
)
def test_kept_ones_and_the_next_must_fit(keep_last, saves, free, tmp_path, monkeypatch):
    """Of 100 bytes each, of which the run has one."""
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "__0_0.distcp").write_bytes(bytes(100))
    (tmp_path / "other").write_bytes(bytes(100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    check_space(tmp_path, 100, keep_last, saves)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(UserError, match=r"GB are free, too few .* make room") as refused:
        check_space(tmp_path, 100, keep_last, saves)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_yet_to_be_made(tmp_path):
    check_space(tmp_path / "a" / "b", 1, None, 2)
    with pytest.raises(UserError, match="too few for the run's checkpoints: 2 of"):
        check_space(tmp_path / "a" / "b", 10**18, None, 2)

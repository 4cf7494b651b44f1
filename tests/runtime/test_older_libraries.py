"""Interfaces that images for GPUs may hold in older versions, imitated: torch from 2.6, Triton from 3.3."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from eagle_kernels import dispatch
from eagle_kernels.configurations import INTERPRETER, configuration
from eagle_kernels.dispatch import explain, is_interpreted
from megatron_eagle.checkpoint import index
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.training import stages
from megatron_eagle.training.resilience.policy import Preempted
from tests.training.test_training import train_main


def test_triton_before_its_knobs(monkeypatch):
    """Triton 3.3 has no `triton.knobs`, which said whether kernels run in the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delattr(dispatch.triton, "knobs")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not is_interpreted() and explain("auto", torch.device("cuda")) == (True, "triton (auto, on CUDA)")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert is_interpreted() and configuration.__wrapped__(torch.device("cpu")) == INTERPRETER


@dataclass
class OldMetadata:
    """torch's `Metadata` up to 2.8."""

    state_dict_metadata: dict[str, Any]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: Any = None


def test_torch_before_the_version_of_its_index(tmp_path, monkeypatch):
    entry = index.StoredBox("weight", torch.float32, (2, 3), (0, 0), (2, 3), "__0_0.distcp", 0, 24)
    index.write_checkpoint_index(tmp_path, [entry])
    today = index.read_index(tmp_path)
    monkeypatch.setattr(index, "Metadata", OldMetadata)
    allowed = {**index._IndexUnpickler.ALLOWED, __name__: {"OldMetadata"}}
    monkeypatch.setattr(index._IndexUnpickler, "ALLOWED", allowed)
    index.write_checkpoint_index(tmp_path, [entry])
    assert vars(index.read_index(tmp_path)) == vars(today) and today.version == "1.0.0"


def test_a_stopped_run_ends_with_the_status_that_torchrun_needs(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Preempted("stopped by a signal after iteration 3, which is saved", 3)

    monkeypatch.setattr(stages, "load_stages", lambda *_, **__: [])
    monkeypatch.setattr(stages, "train_stages", stopped)
    for given, status in (([], 75), (["--stopped-status", "0"], 0)):
        monkeypatch.setattr("sys.argv", ["train.py", "run", "--config", "run.yaml", *given])
        assert train_main()() == status
        assert f"start again to go on (status {status})" in capsys.readouterr().err


def test_a_restart_over_the_store_of_before(monkeypatch):
    """torchrun shares its store with the processes, from torch 2.5 on: restarted ones would hang in it."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with (
        pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun") as refused,
        process_group(detect_device()),
    ):
        pass
    assert "\n" not in str(refused.value)
    for name, value in (("TORCHELASTIC_RESTART_COUNT", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "False")):
        monkeypatch.setenv(name, value)
        with process_group(detect_device()):
            pass
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")

"""What our torchrun says of its end, for the script that looks for the node that has failed."""

import json
import socket
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

from megatron_eagle.runtime import torchrun


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (-9, "", "killed"),
        (137, "", "killed"),
        (1, "", "error"),
        (2, "UserError: /data: no such folder", "error"),
        (1, "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]", "lost"),
        (1, "DistBackendError: NCCL error in: ...", "lost"),
        (-6, "", "lost"),
        (70, "", "hang"),
        (75, "", "told"),
        (-15, "", "told"),
    ],
)
def test_kinds(status: int, message: str, kind: str, tmp_path: Path) -> None:
    if message:
        said = {"message": {"message": message, "extraInfo": {"timestamp": "1"}}}
        (tmp_path / "error.json").write_text(json.dumps(said))
    assert torchrun.kind_of(ProcessFailure(0, 1, status, str(tmp_path / "error.json"))) == kind


def test_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The node by Slurm's name; of several processes the one that was killed, with its rank."""
    said = {"message": {"message": "ValueError: a broken\npicture", "extraInfo": {"timestamp": "1"}}}
    (tmp_path / "error.json").write_text(json.dumps(said))
    failures = {5: ProcessFailure(1, 1, 1, str(tmp_path / "error.json"))}

    def ends(words: list[str]) -> None:
        raise ChildFailedError("run", failures)

    monkeypatch.setattr(torchrun, "torchrun", ends)
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    file = tmp_path / "logs" / socket.gethostname() / "ended-7"
    for text in (
        "error n2 rank 5 was the first to end early, by status 1 (ValueError: a broken picture)",
        "killed n2 rank 4 was the first to end early, by SIGKILL",
    ):
        assert torchrun.main(["--rdzv-id", "7", "--log-dir", f"{tmp_path}/logs/%h", "script.py"]) == 1
        assert file.read_text() == f"{text}\n"
        assert f" ended: {text.partition(' n2 ')[2]}\n" in capsys.readouterr().err
        failures[4] = ProcessFailure(0, 1, -9, "")


def test_a_file_of_errors_that_a_full_disk_has_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is read by torch, which raises what json does."""

    def ends(words: list[str]) -> None:
        (tmp_path / "error.json").touch()
        ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))

    monkeypatch.setattr(torchrun, "torchrun", ends)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert torchrun.main(["--rdzv-id", "7", "--log-dir", str(tmp_path), "script.py"]) == 1
    assert (tmp_path / "ended-7").read_text().startswith("error ")
    assert "a process has failed, and could not write why (a full disk?)" in capsys.readouterr().err


def test_who_has_only_lost_the_others_ends_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(words: list[str]) -> None:
        raise RendezvousTimeoutError("too late")

    waited: list[float] = []
    monkeypatch.setattr(torchrun, "torchrun", ends)
    monkeypatch.setattr(torchrun.time, "sleep", waited.append)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert torchrun.main(["--rdzv-id", "7", "--log-dir", str(tmp_path), "script.py"]) == 1
    assert (tmp_path / "ended-7").read_text().startswith("lost ") and waited == [5.0]

"""The real Slurm of these tests takes itself away, however it is told to end."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from tests.cluster import slurm


@pytest.fixture
def taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes what a Slurm that is none takes away."""
    done: list[str] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # one lock for each machine
    monkeypatch.setattr(slurm, "_take_away", lambda: done.append("namespaces"))
    monkeypatch.setattr(slurm, "_run", lambda *words: done.append(words[0]))
    monkeypatch.setattr(slurm.Slurm, "_end_daemons", lambda _: done.append("daemons"))
    for name in ("_prepare", "_start", "wait_for_nodes"):
        monkeypatch.setattr(slurm.Slurm, name, lambda *_: None)
    return done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_takes_all_away(taken_away: list[str], tmp_path: Path, number: signal.Signals) -> None:
    """A second one, while that happens, changes nothing."""
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=number.name), slurm.Slurm(tmp_path):
        taken_away.clear()  # of what was there before
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert taken_away == ["daemons", "umount", "namespaces"]
    assert signal.getsignal(number) == before


def test_so_does_the_end(taken_away: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with slurm.Slurm(tmp_path):
        taken_away.clear()
    assert taken_away == ["daemons", "umount", "namespaces"]
    assert signal.getsignal(signal.SIGTERM) == before

"""Where the real Slurm cannot start, its tests say why and what to install."""

import os
from pathlib import Path

import pytest

from tests.cluster import conftest, slurm


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is PATH, with every program that is needed; root."""
    for name in slurm.PROGRAMS:
        (tmp_path / name).write_text("#!/bin/sh\necho slurm-wlm 22.05.8\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name if (tmp_path / name).exists() else None)
    return tmp_path


def test_all_is_there(machine: Path) -> None:
    assert slurm.missing() is None


@pytest.mark.parametrize("name", ["munged", "srun"])
def test_a_program_is_missing(machine: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (machine / name).unlink()
    assert slurm.main([]) == 1
    assert f"{name} not found: apt-get install -y slurm-wlm munge iproute2" in capsys.readouterr().out


def test_no_root(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in (slurm.missing() or "") and slurm.INSTALL not in (slurm.missing() or "")
    (machine / "munged").unlink()
    assert f"as root; munged not found: {slurm.INSTALL}" in (slurm.missing() or "")


@pytest.mark.parametrize("said", ["slurm-wlm 20.11.4", "slurm 21.08.8", ""])
def test_an_old_slurm(machine: Path, said: str) -> None:
    (machine / "slurmctld").write_text(f"#!/bin/sh\necho {said}\n")
    reason = slurm.missing() or ""
    assert reason.startswith(f"{said or 'slurmctld -V says nothing'}: needs Slurm 22.05 or later")
    assert reason.endswith(slurm.INSTALL)


def test_a_newer_slurm(machine: Path) -> None:
    (machine / "slurmctld").write_text("#!/bin/sh\necho slurm 23.02.1\n")
    assert slurm.missing() is None


def test_a_root_without_rights(machine: Path) -> None:
    (machine / "unshare").write_text("#!/bin/sh\necho Operation not permitted >&2; exit 1\n")
    assert "Operation not permitted" in (slurm.missing() or "") and "SYS_ADMIN" in (slurm.missing() or "")


@pytest.mark.parametrize("reason", [None, "needs root"])
def test_a_skip_is_a_failure_where_it_is_there(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "missing", lambda: reason)
    skipped = pytest.TestReport("test", ("test", 1, "test"), {}, "skipped", "for some reason", "setup")
    hook = conftest.pytest_runtest_makereport()
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(skipped)
    assert ended.value.value.outcome == ("skipped" if reason else "failed")

"""The simulator of context parallel layouts: the claims of its card, and packs of a real store."""

import json
import subprocess
import sys

import pytest

from tests.paths import REPO


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "tools" / "bench.py"), "context_parallel", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_balanced_costs_two_percent_at_most(tmp_path):
    card, plot = tmp_path / "card.json", tmp_path / "plot.png"
    result = bench("--json", str(card), "--plot", str(plot))
    assert result.returncode == 0, result.stderr
    rows = {(row["pack"], row["CP"], row["layout"]): row for row in json.loads(card.read_text())["rows"]}
    kinds = {pack for pack, _, _ in rows}
    assert len(kinds) == 5
    assert all(rows[kind, 8, "balanced"]["worst"] <= 1.02 for kind in kinds)
    assert rows["96K + 32K", 8, "zigzag"]["step"] == pytest.approx(1.41, abs=0.01)
    assert rows["video mix", 8, "balanced"]["ring"] > 1.5, "a ring waits for its slowest rank in every step"
    assert rows["one 128K document", 8, "zigzag"]["ring"] == pytest.approx(1, abs=0.01), "even steps"
    assert rows["one 128K document", 16, "zigzag"]["auto"] == "ring 1", "a gather across nodes is not hidden"
    assert rows["one 128K document", 8, "balanced"]["auto"] == "gather 1"
    assert rows["chat 200-2000", 8, "balanced"]["saved %"] > 95
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", ["absent/64", "absent"])
def test_a_missing_store_is_named(folder):
    result = bench("--packs", folder)
    assert result.returncode == 2 and result.stderr.startswith("error: absent")

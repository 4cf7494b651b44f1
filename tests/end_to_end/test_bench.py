"""The benchmark tool prints its table and writes a card that can be repeated."""

import json
import subprocess
import sys

from tests.paths import REPO


def test_packing_beats_streaming_and_grows_linearly(tmp_path):
    card_file = tmp_path / "card.json"
    command = [sys.executable, str(REPO / "tools" / "bench.py"), "packing", "--json", str(card_file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "next fit" in result.stdout
    card = json.loads(card_file.read_text())
    assert card["command"] == "python tools/bench.py packing"
    rows = {(row["samples"], row["packer"]): row for row in card["rows"]}
    assert rows[20_000, "ours"]["fill %"] >= 99.9
    assert rows[2_000, "ours"]["fill %"] >= 99 > rows[2_000, "next fit"]["fill %"]
    assert rows[2_000, "ours"]["fill %"] > rows[2_000, "least loaded"]["fill %"]
    assert rows[20_000, "ours"]["even steps % (1 pack a rank)"] >= 95
    assert rows[20_000, "best fit"]["even steps % (1 pack a rank)"] < 50
    assert rows[1_000_000, "ours"]["CPU s"] < 4
    # Ten times the samples: far from a hundred times the time.
    assert rows[200_000, "ours"]["CPU s"] < 40 * rows[20_000, "ours"]["CPU s"]

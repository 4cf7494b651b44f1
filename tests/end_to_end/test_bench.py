"""The benchmark tool prints its table and writes a card that can be repeated."""

import json
import subprocess
import sys

import pytest

from tests.paths import REPO


def run_benchmark(name, tmp_path):
    """What it prints, and the rows of its card."""
    card_file = tmp_path / "card.json"
    command = [sys.executable, str(REPO / "tools" / "bench.py"), name, "--json", str(card_file)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    card = json.loads(card_file.read_text())
    assert card["command"] == f"python tools/bench.py {name}"
    return result.stdout, card


@pytest.mark.slow
def test_packing_beats_streaming_and_grows_linearly(tmp_path):
    printed, card = run_benchmark("packing", tmp_path)
    assert "next fit" in printed
    rows = {(row["samples"], row["packer"]): row for row in card["rows"]}
    assert rows[20_000, "ours"]["fill %"] >= 99.9
    assert rows[2_000, "ours"]["fill %"] >= 99 > rows[2_000, "next fit"]["fill %"]
    assert rows[2_000, "ours"]["fill %"] > rows[2_000, "least loaded"]["fill %"]
    assert rows[20_000, "ours"]["even steps % (1 pack a rank)"] >= 95
    assert rows[20_000, "best fit"]["even steps % (1 pack a rank)"] < 50
    assert rows[1_000_000, "ours"]["CPU s"] < 4
    # Ten times the samples: far from a hundred times the time.
    assert rows[200_000, "ours"]["CPU s"] < 40 * rows[20_000, "ours"]["CPU s"]


@pytest.mark.slow
def test_store_opens_quickly_and_reads_quickly(tmp_path):
    _, card = run_benchmark("store", tmp_path)
    ours = [row for row in card["rows"] if row["reader"] == "ours"]
    assert [row["samples"] for row in ours] == [100_000, 1_000_000]
    assert all(row["open s"] < 2 and row["anonymous MB"] < 300 for row in ours)
    peers = [row for row in card["rows"] if row["samples"] == 100_000 and row["reader"] != "ours"]
    assert all(row["us per sample, warm"] > ours[0]["us per sample, warm"] for row in peers)


@pytest.mark.slow
def test_tiles_are_those_of_pillow(tmp_path):
    _, card = run_benchmark("tiles", tmp_path)
    rows = [row for row in card["rows"] if row["by"] == "ours"]
    assert len(rows) == 7 and rows[-1]["tiles"] == 43
    assert all(row["mean difference to Pillow of 255"] < 0.01 for row in rows[:-1])


@pytest.mark.slow
def test_preprocessing(tmp_path):
    """It beats the naive loop; no container costs twice what files do; memory does not grow with rows."""
    _, card = run_benchmark("preprocess", tmp_path)
    mix = {row["way"]: row for row in card["rows"] if row["from"] == "files, a mix"}
    assert mix["ours"]["CPU s"] < mix["naive loop"]["CPU s"]
    assert mix["ours, one pass"]["CPU s"] < mix["ours, a pass per length"]["CPU s"]
    ours = {row["from"]: row for row in card["rows"] if row["way"] == "ours" and row["samples"] == 200}
    assert ours.keys() == {"files", "LMDB", "tar", "parquet", "Arrow"}
    assert all(row["CPU s"] < 2 * ours["files"]["CPU s"] for row in ours.values())
    growth = [row for row in card["rows"] if row["from"].endswith("pictures of 64x48")]
    assert [row["samples"] for row in growth] == [500, 2_000] * (len(growth) // 2) and growth
    for few, many in zip(growth[::2], growth[1::2], strict=True):
        assert few["from"] == many["from"] and many["peak MB"] < few["peak MB"] + 30


@pytest.mark.slow
def test_a_long_video_goes_through_every_step(tmp_path):
    """Beyond 32,768 tokens; the exported processor makes of the video what training has seen."""
    _, card = run_benchmark("long_video", tmp_path)
    assert 32_768 < card["tokens"] < 36_864
    steps = [row["step"] for row in card["rows"]]
    asked = ("preprocess run", "pack", "train run", "convert export", "generate", "evaluate run")
    assert {f"megatron-eagle {name}" for name in asked} <= set(steps)
    assert card["certificate"]["green"]
    (whole, *_) = card["certificate"]["samples"]
    assert whole["tokens"] == card["tokens"] and whole["hashes"]["training"] == whole["hashes"]["processor"]
    # Far less than scores of all tokens with all, 4 bytes each.
    assert all(row["peak GB"] < 4 * card["tokens"] ** 2 / 1e9 for row in card["rows"])

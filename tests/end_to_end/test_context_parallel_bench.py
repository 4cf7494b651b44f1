"""The counts of context parallelism's benchmarks: the claims of their cards, and packs of a real store."""

import json
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest

from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.parallel import ParallelConfig
from tests.data.helpers import make_store, make_tokenizer
from tests.paths import REPO

with patch.object(sys, "path", [*sys.path, str(REPO / "tools")]):
    from benchmarks import context_cost, context_layouts, context_packs, context_parallel


@pytest.mark.slow
def test_balanced_costs_two_percent_at_most(tmp_path):
    card, plot = tmp_path / "card.json", tmp_path / "plot.png"
    command = [sys.executable, str(REPO / "tools" / "bench.py"), "context_layouts", "--json", str(card)]
    result = subprocess.run([*command, "--plot", str(plot)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {(row["pack"], row["CP"], row["layout"]): row for row in json.loads(card.read_text())["rows"]}
    kinds = {pack for pack, _, _ in rows}
    assert len(kinds) == 5
    assert all(rows[kind, 8, "balanced"]["worst"] <= 1.02 for kind in kinds)
    assert rows["3/4 + 1/4", 8, "zigzag"]["step"] == pytest.approx(1.41, abs=0.01)
    keys = {size: rows["one document", size, "balanced"]["+ keys"] for size in (8, 16)}
    assert keys[16] > 1.05 > keys[8], "the network"
    assert rows["chat 200-2000", 8, "balanced"]["saved %"] > 95
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("benchmark", [context_layouts, context_parallel])
@pytest.mark.parametrize("folder", ["absent/64", "absent"])
def test_a_missing_store_is_named(benchmark, folder):
    with pytest.raises(UserError, match="^absent"):
        benchmark.run(packs=folder)


def test_batches_of_a_store(tmp_path, capsys):
    """Of a store, too; one that has fewer packs than a batch says so and has no row."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    texts = ["a b c " * (4 + 37 * number % 80) for number in range(400)]
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "d"}] for text in texts]
    store = make_store(tmp_path, tokenizer, [{"conversations": own} for own in turns], (512,))
    write_packs(store, 512, 0)
    packs = context_packs.store_packs(str(store / "512"))
    assert 16 <= len(packs.bounds) < 512
    rows = context_parallel.batch_rows(packs, 8)
    assert [row["way"] for row in rows] == ["K = 1", "K = 2", "K = 4", "K = 8", "K = 1"]
    assert [row["wins"] for row in rows].count("*") == 1 and not rows[-1]["wins"]
    assert rows[3]["costliest/mean"] < rows[0]["costliest/mean"]
    assert context_parallel.batch_rows(packs, 512) == []
    assert "512: left out" in capsys.readouterr().err


def test_packs_laid_end_to_end_even_out_whole_batches():
    """The targets of the long mix with one pack a data parallel rank of four; with one pack a sequence the
    costliest rank is far from the mean."""
    rows = context_parallel.batch_rows(context_packs.mixed_packs(), 8)
    uneven = {(row["way"], row["packs"].split(", ")[2]): row["costliest/mean"] for row in rows}
    assert uneven["K = 1", "1 a rank"] > 1.2
    assert uneven["K = 2", "1 a rank"] < 1.1 and uneven["K = 1", "2 a rank"] < 1.1
    assert uneven["K = 4", "1 a rank"] <= 1.04 and uneven["K = 8", "1 a rank"] <= 1.03


def test_where_each_way_wins():
    """Gather inside a node; across nodes a ring of one document, and needed ranges of short ones."""
    found = {}
    for kind, size in [("one document", 8), ("one document", 16), ("chat 200-2000", 16)]:
        members = context_packs.made_up_packs(131072)[kind]
        rows = context_parallel.one_pack_rows(kind, members, size)
        found[kind, size] = {row["way"]: row for row in rows}
        [winner] = [row for row in rows if row["wins"]]
        assert winner["step"] == min(row["step"] for row in rows)
    assert found["one document", 8]["gather"]["wins"] == found["chat 200-2000", 16]["ranges"]["wins"] == "*"
    document = found["one document", 16]
    assert document["ring, zigzag"]["step"] < document["gather"]["step"] < document["ranges"]["step"]
    assert document["ring"]["auto"] == "ring 1"
    assert document["ring"]["keys MB"] < document["gather"]["keys MB"]


def test_keys_of_other_nodes_take_the_network():
    """The same work and layout; only the links differ."""
    seconds = []
    for node in (8, 16):
        with patch.object(context_cost, "NODE", node):
            parallel = ParallelConfig(context_parallel_size=16, context_parallel_comm="gather")
            planned = context_cost.plan(parallel, [0, 131072])
            seconds.append(context_cost.cost(parallel, [0, 131072], planned).exposed)
    assert seconds[0] == pytest.approx(seconds[1] * 300 / 40, rel=0.01)


def test_bounds_of_joined_packs():
    packs = context_packs.Packs("two", 10, [[0, 4, 10], [0, 10]], np.zeros(2))
    assert context_packs.join_bounds(packs.bounds, 10) == [0, 4, 10, 20]
    assert packs.sum_squares.tolist() == [52, 100]


@pytest.mark.slow
def test_the_real_code_is_timed_beside(tmp_path):
    """Every way and three K, on four processes; one pack a rank leaves three of them waiting."""
    with patch.object(sys, "path", [*sys.path, str(REPO / "tools")]):  # that its processes have, too
        from benchmarks.context_wall import wall_rows

        rows = {(row["packs"], row["way"]): row for row in wall_rows()}
    assert len(rows) > 15 and all(row["wall s"] > 0 for row in rows.values())
    packs = {way: row["costliest/mean"] for (kind, way), row in rows.items() if way.startswith("K")}
    assert packs["K = 1"] > 1.1 and packs["K = 4"] < 1.05

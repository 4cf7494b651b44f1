"""The report of a run: one file, its numbers, nothing from outside, the user's text as text."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.training.metrics import StepMetrics
from megatron_eagle.training.report import write_report
from tests.unit.test_training import train_main


def write_logs(run, count: int, **last) -> None:
    logs = run / "logs"
    logs.mkdir(parents=True)
    steps = [StepMetrics(i, 4.0 / i, 1.0, 1e-3, 1000, 0.5, 0.1) for i in range(1, count + 1)]
    lines = [asdict(step) for step in steps]
    lines[-1] |= last
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_report_stands_alone(tmp_path, monkeypatch, capsys):
    run = tmp_path / "a <b>run</b>"
    write_logs(run, 40, evaluation_loss=1.25, mfu=0.41)
    event = {"iteration": 7, "event": "skipped", "reason": "<script>alert(1)</script>"}
    (run / "logs" / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "iter_0000040").mkdir()
    (run / "iter_0000040" / "run.yaml").write_text("data: {path: </pre><script>}\n")
    monkeypatch.setattr("sys.argv", ["train.py", "report", str(run)])
    assert train_main()() == 0
    assert capsys.readouterr().out.strip() == str(run / "logs" / "report.html")
    page = (run / "logs" / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href|url)\s*[=(]", page) and "http" not in page
    for text in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "1.2500", "41.0 %", "2,000"):
        assert text in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        ElementTree.fromstring(chart)  # well formed


def test_long_and_short_runs(tmp_path):
    for count in (1, 5000):
        run = tmp_path / str(count)
        write_logs(run, count)
        page = write_report(run, tmp_path / f"{count}.html").read_text()
        curve = re.search(r'points="([^"]*)"', page)[1].split()
        assert len(curve) == min(count, 1250) and len(page) < 300_000


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no finished step to report"):
        write_report(tmp_path)
    write_logs(tmp_path / "run", 2)
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path / "run", tmp_path / "absent" / "report.html")


def test_status_names_ranks(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "logs" / "heartbeat"
    folder.mkdir(parents=True)
    for rank, phase in enumerate(("forward and backward", "data")):
        beat = {"rank": rank, "host": "node", "pid": 1, "iteration": 3, "phase": phase}
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps({**beat, "since": 0, "written": 4e9}))
    monkeypatch.setattr("sys.argv", ["train.py", "status", str(tmp_path)])
    assert train_main()() == 0
    assert "behind the others: rank 1 on node (pid 1) in iteration 3, data" in capsys.readouterr().out

"""The report of a run: one file, its numbers, nothing from outside, the user's text as text."""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.training.monitoring.charts import line_chart, share_chart
from megatron_eagle.training.monitoring.metrics import StepMetrics
from megatron_eagle.training.monitoring.report import write_run_report
from megatron_eagle.training.resilience.owner import Ownership
from tests.training.test_training import train_main


def write_logs(run, count: int, **last) -> None:
    logs = run / "logs"
    logs.mkdir(parents=True)
    steps = [StepMetrics(i, 4.0 / i, 1.0, 1e-3, 1000, 0.5, 0.1) for i in range(1, count + 1)]
    lines = [asdict(step) for step in steps]
    for line in lines:
        line |= {
            "samples_by_length": {"512": 0.75, "1024": 0.25},
            "tokens_by_length": {"512": 0.5, "1024": 0.5},
        }
        line |= {"frames": 30, "frames_wanted": 40, "tiles": 0, "tiles_wanted": 0, "packing": 0.9}
        line |= {"data_seconds": 0.05, "host_memory_gib": 2.5}
    lines[-1] |= last
    (logs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_report_stands_alone(tmp_path, monkeypatch, capsys):
    run = tmp_path / "a <i>run</i>"
    write_logs(run, 40, evaluation_loss=1.25, mfu=0.41, aux_loss=2.03)
    event = {"iteration": 7, "event": "skipped", "reason": "<script>alert(1)</script>"}
    (run / "logs" / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "iter_0000040").mkdir()
    (run / "iter_0000040" / "run.yaml").write_text("data: {path: </pre><script>}\n")
    monkeypatch.setattr("sys.argv", ["train.py", "report", str(run)])
    assert train_main()() == 0
    assert capsys.readouterr().out.strip() == str(run / "logs" / "report.html")
    page = (run / "logs" / "report.html").read_text()
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href|url)\s*[=(]", page) and "http" not in page
    for text in (
        "1.2500",
        "41.0%",
        "2,000",
        "75.0%",
        "10.0%",
    ):  # evaluation, MFU, tokens/s, frames, data wait
        assert f"<b>{text}</b>" in page
    figures = re.findall(r"<figure><h2>(.*?)</h2>.*?(<svg.*?</svg>)", page, re.DOTALL)
    assert [title.split(":")[0] for title, _ in figures] == [
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Auxiliary loss of the routers",
        "Tokens per second",
        "MFU, %",
        "Seconds per step",
        "Length mix",
        "Length mix",
        "ADS",
        "ADS",
        "Packing, %",
        "Host memory, GiB",
    ]
    for _, chart in figures:
        ElementTree.fromstring(chart)  # well formed
    assert "<td>7</td><td>skipped</td><td>&lt;script&gt;" in page
    assert "<title>7: skipped</title>" in figures[0][1], "events are marked in the loss"


def test_evaluations_are_drawn_wherever_they_fall(tmp_path):
    """Lines of their own, after skipped steps too, and those that older versions wrote into a step's."""
    write_logs(tmp_path, 4, evaluation_loss=1.25)
    with open(tmp_path / "logs" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"iteration": 6, "evaluation_loss": 1.5}) + "\n")
    page = write_run_report(tmp_path).read_text()
    assert "<b>1.5000</b><span>evaluation loss, last" in page and "<b>4</b><span>iterations" in page
    losses = re.search(r"<h2>Loss</h2>.*?</svg>", page, re.DOTALL)[0]
    curves = [points.split() for points in re.findall(r'points="([^"]*)"', losses)]
    assert [len(points) for points in curves] == [4, 2]


def test_long_and_short_runs(tmp_path):
    for count in (1, 5000):
        run = tmp_path / str(count)
        write_logs(run, count)
        page = write_run_report(run, tmp_path / f"{count}.html").read_text()
        curve = re.search(r'points="([^"]*)"', page)[1].split()
        assert len(curve) == min(count, 715) and len(page) < 300_000


def test_shares_fill_the_chart():
    """The lower edge of each share is the upper edge of the one below; the last ends at 100 %."""
    chart = share_chart([1, 2, 3], {"short": [0.25, 0.5, 1.0], "long": [0.75, 0.5, 0.0]})
    short, long = (
        [tuple(map(float, point.split(","))) for point in outline.split()]
        for outline in re.findall(r'points="([^"]*)"', chart)
    )
    assert short[:3] == long[3:][::-1]
    top = {y for _, y in long[:3]}
    assert len(top) == 1 and short[2][1] in top, "where all are short, they reach the top"


@pytest.mark.parametrize(
    ("curve", "labels"),
    [
        ([(1, 0.0), (9, 2e-5)], ["0", "5e-06", "1e-05", "1.5e-05", "2e-05"]),
        ([(1, 1_300.0), (9, 1_300_000.0)], ["0", "500,000", "1M", "1.5M"]),
        ([(1, 3.0)], ["0", "0.5", "1", "1.5", "2", "2.5", "3"]),
    ],
)
def test_axes_have_round_numbers(curve, labels):
    chart = line_chart({"": curve})
    assert re.findall(r'text-anchor="end">([^<]*)<', chart) == labels


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no finished step to report"):
        write_run_report(tmp_path)
    write_logs(tmp_path / "run", 2)
    with pytest.raises(UserError, match="cannot write the report"):
        write_run_report(tmp_path / "run", tmp_path / "absent" / "report.html")


def test_status_names_ranks(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "logs" / "heartbeat"
    folder.mkdir(parents=True)
    for rank, phase in enumerate(("forward and backward", "data")):
        beat = {"rank": rank, "host": "node", "pid": 1, "iteration": 3, "phase": phase}
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps({**beat, "since": 0, "written": 4e9}))
    monkeypatch.setattr("sys.argv", ["train.py", "status", str(tmp_path)])
    assert train_main()() == 0
    said = capsys.readouterr().out
    assert "behind the others: rank 1 on node (pid 1) in iteration 3, data" in said
    assert said.startswith("owner: none, no run writes here now\n")
    with Ownership(tmp_path):
        for named in (tmp_path, tmp_path / "logs"):
            monkeypatch.setattr("sys.argv", ["train.py", "status", str(named)])
            assert train_main()() == 0
            said = capsys.readouterr().out
            assert f"owner: process {os.getpid()} on " in said and "; alive: last sign of life" in said


def test_data_sets_are_drawn_and_listed(tmp_path):
    """The heaviest have curves, the others are one share; a data set that is absent leaves a gap."""
    write_logs(tmp_path, 30)
    file = tmp_path / "logs" / "metrics.jsonl"
    names, lines = ["<b>x</b>", *(f"set {k}" for k in range(10))], []
    for line in map(json.loads, file.read_text().splitlines()):
        there = [name for k, name in enumerate(names) if k != 1 or line["iteration"] <= 10]
        parts = {"loss": 1 / line["iteration"], "share": 1 / len(there), "tokens": 100}
        for what, value in parts.items():
            line[f"{what}_by_dataset"] = dict.fromkeys(names) | dict.fromkeys(there, value)
        lines.append(line)
    held_out = {f"evaluation_{what}_by_dataset": {"other": 0.25, "none": None} for what in parts}
    lines.append({"iteration": 30, "evaluation_loss": 0.25, **held_out})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(tmp_path).read_text()
    assert "<b>x</b>" not in page and "&lt;b&gt;x&lt;/b&gt;" in page
    titles = "Loss by data set", "Evaluation loss by data set", "Mix: weight in the loss, %"
    losses, evaluation, mix = (
        page.partition(f"<h2>{title}</h2>")[2].partition("</figure>")[0] for title in titles
    )
    assert losses.count("<polyline") == 8 and "The 8 with most weight, of 11." in losses
    assert evaluation.count("<polyline") == 1 and "</b>other</span>" in evaluation
    assert mix.count("<polygon") == 9 and "</b>others</span>" in mix
    cell = '<td class="number">{}</td>'.format
    row = f"<tr><td>set 0</td>{cell('1,000')}{cell('3.03')}{cell('0.2929')}{cell('-')}</tr>"
    assert row in page, "trained on in 10 of 30 steps"
    assert f"<tr><td>other</td>{cell('-') * 3}{cell('0.2500')}</tr>" in page
    assert f"<tr><td>none</td>{cell('-') * 4}</tr>" in page

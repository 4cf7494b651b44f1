"""HourVideo's test split: asked here, scored elsewhere."""

import json

import pytest

from megatron_eagle.commands import evaluate
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.submission import write_submission
from tests.data.helpers import make_video
from tests.eagle_video.helpers import call_tool
from tests.evaluation.published_cases import write


def row(name, options="abcde"):
    answers = {f"answer_{i}": option for i, option in enumerate(options, start=1)}
    return {"qid": name, "task": "summarization", "question": f"Q {name}", **answers}


VIDEOS = {
    "u1": {"video_metadata": {"n": 1}, "benchmark_dataset": [row("q1"), row("q2")]},
    "u2": {"video_metadata": {"n": 2}, "benchmark_dataset": [row("q3"), row("q4", "abcd")]},
}
REPLIES = {"Q q1": "C", "Q q2": "I cannot tell", "Q q3": "(A) a"}  # q4 cannot be asked


class _Model:
    def __init__(self):
        self.asked = []

    def answer(self, request, sampling):
        self.asked.append(request.prompt.split("\n")[0])
        return REPLIES[self.asked[-1]]


def test_the_authors_file_gets_its_letters(tmp_path, monkeypatch):
    data, model = tmp_path / "data", _Model()
    write(data, "test_v1.0_annotations.json", VIDEOS)
    write(data, "dev_v1.0_annotations.json", {"u3": {"benchmark_dataset": [row("q9")]}})
    for name in ("u1", "u2"):
        make_video(data / f"{name}.mp4", 4)
    monkeypatch.setattr(evaluate, "_model", lambda options, output: model)
    run = (
        "run",
        "--hf",
        tmp_path,
        "--published",
        "hourvideo-test",
        "--data",
        data,
        "--output",
        tmp_path / "o",
    )

    done = call_tool("evaluate", *run, "--limit", "1")
    assert done.returncode == 0 and "1 of 4 questions have a letter" in done.stdout, done.stderr
    done = call_tool("evaluate", *run)
    assert "2 of 4 questions have a letter" in done.stdout and model.asked == sorted(REPLIES)
    assert "1 questions in no score" in done.stdout and "no answer_5" in done.stdout
    assert "submission " not in done.stdout  # no line of scores

    submitted = json.loads((tmp_path / "o" / "submission.json").read_text())
    labels = {one["qid"]: one.pop("predicted_answer_label", None) for one in rows_of(submitted)}
    assert labels == {"q1": "C", "q2": None, "q3": "A", "q4": None}
    assert submitted == VIDEOS

    table = call_tool("evaluate", "table", tmp_path / "o")
    cells = table.stdout.splitlines()[1].split()
    assert table.returncode == 0 and cells[1:] == ["3", "11,794", "-", "41.80", "-"]
    assert "3 of 11,794 questions (test): 11,791 are missing" in table.stdout
    done = call_tool("evaluate", "report", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "o" / "report.html").read_text()
    assert "3 answers are not scored here" in page and "submission.json" in page
    assert "The worst answers" not in page and "1 in no score: bad question" in page


def test_a_curve_of_what_is_scored_elsewhere_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_model", None)
    asked = ["--hf", tmp_path, "--published", "hourvideo-test", "--data", tmp_path, "--output", tmp_path]
    done = call_tool("evaluate", "frames", *asked)
    assert done.returncode == 2 and "hourvideo-test: scored by its authors' server" in done.stderr
    assert not list(tmp_path.iterdir())


def rows_of(videos):
    return [one for video in videos.values() for one in video["benchmark_dataset"]]


@pytest.mark.parametrize("content", ["{", "[]", '{"u1": {}}', '{"u1": {"benchmark_dataset": [{}]}}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match="no questions by video as in HourVideo's file"):
        write_submission(tmp_path / "t.json", {}, tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()

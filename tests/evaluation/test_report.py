"""The page of evaluations: what is wrong is seen with what it was asked about; nothing is loaded."""

import json
import re

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import finished
from megatron_eagle.evaluation.finished import read_finished, worst
from megatron_eagle.evaluation.report import render_evaluations
from megatron_eagle.evaluation.shown_media import media_figures
from megatron_eagle.inference.generate import Request, Sampling
from tests.data.helpers import make_image, make_video, write_jsonl
from tests.eagle_video.helpers import call_tool
from tests.eagle_video.server import serving

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def mvbench(tmp_path):
    """Two categories of MVBench, three questions each, about one video; one video is missing."""
    data = tmp_path / "mvbench"
    (data / "json").mkdir(parents=True)
    make_video(data / "clip.mp4", 40, fps=4)
    for category in ("counting", "order"):
        rows = [
            {
                "video": "clip.mp4",
                "question": f"{category} {k}?",
                "candidates": ["one", EVIL],
                "answer": "one",
            }
            for k in range(3)
        ]
        rows[2]["video"] = "gone.mp4"
        (data / "json" / f"{category}.json").write_text(json.dumps(rows))
    return data


def test_the_page_of_a_curve(tmp_path, mvbench, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    output = tmp_path / "o"

    def answer(request):
        prompt = json.dumps(request["messages"])
        return f"B {EVIL}" if "0?" in prompt or "order" in prompt else "A"

    with serving(answer) as server:
        asked = ["--endpoint", server.url, "--model", "m", "--published", "mvbench", "--data", mvbench]
        done = call_tool("evaluate", "frames", *asked, "--output", output, "--frames", 8, 16)
        assert done.returncode == 0, done.stderr
    done = call_tool("evaluate", "report", output)
    assert done.returncode == 0, done.stderr
    page = (output / "report.html").read_text()
    assert EVIL not in page and "&lt;script&gt;" in page
    assert "src=http" not in page.replace('"', "") and "<script" not in page
    assert page.count('alt="score over the number of frames"') == 1
    assert page.count("not shown: video not found") == 0  # what could not be asked is in no answer
    assert page.count("2 in no score: not asked; the first: ") == 2 and "gone.mp4" in page
    # 10 s at 2 fps: the model was given 16 frames of 20. Answers are those of the run with most frames.
    shown = re.findall(r"<figcaption>video, frame (\d+) of (\d+): ", page)
    assert shown[:8] == [(place, "16") for place in ("1", "3", "5", "7", "10", "12", "14", "16")]
    assert len(shown) == 8 * 3 == 8 * page.count('class="question"')  # one of counting is wrong, two of order
    assert "of 100 by choice" in page and "A. one" in page and "expected: A" in page
    assert page.index("counting 0?") < page.index("order 0?") < page.index("order 1?")


def test_what_was_run_stands_there_for_each_start(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    make_image(tmp_path / "a.png", (64, 48))
    lines = [{"question": f"{k}?", "metric": "exact", "answer": "x", "images": ["a.png"]} for k in range(3)]
    path = write_jsonl(tmp_path / "own.jsonl", lines)
    with serving(lambda _: "y\u2028\x85z") as server:
        asked = ["run", "--endpoint", server.url, "--model", "m", "--benchmark", path, "--output", tmp_path]
        for limit in (1, 1, 3):  # the second asks nothing
            assert call_tool("evaluate", *asked, "--limit", limit).returncode == 0
    (run,) = read_finished(tmp_path)
    assert len(run.asked) == 2 and run.asked[0]["versions"]["megatron_eagle"]
    page = render_evaluations([run])
    assert page.count("<td>own</td>") == 1 + 2 and "picture 1" in page
    path.unlink()
    assert "the questions cannot be read again" in render_evaluations([run])
    with (tmp_path / "answers.jsonl").open("a") as answers:
        answers.write("5\n")
    with pytest.raises(UserError, match="no finished evaluation"):
        read_finished(tmp_path)


def test_the_worst_are_of_every_category_in_turn():
    class Of:
        def __init__(self, category):
            self.category = category

    questions = {str(k): Of("ab"[k >= 4]) for k in range(6)}
    answers = [{"id": str(k), "score": 0.0 if k != 1 else 0.5} for k in range(6)] + [{"id": "?", "score": 0}]
    assert [answer["id"] for _, answer in worst(answers, questions, 4)] == ["0", "4", "2", "5"]
    assert [answer["id"] for _, answer in worst(answers, questions, 10)] == ["0", "4", "2", "5", "3", "1"]


def test_a_run_without_a_limit_of_frames_is_named_so(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    line = {"question": "Which?", "metric": "exact", "answer": "x"}
    path = write_jsonl(tmp_path / "own.jsonl", [line])
    with serving(lambda _: "x") as server:
        asked = ["run", "--endpoint", server.url, "--model", "m", "--benchmark", path, "--output", tmp_path]
        assert call_tool("evaluate", *asked).returncode == 0
        assert call_tool("evaluate", *asked[:-1], tmp_path / "p", "--max-frames", 16).returncode == 0
    read = []
    monkeypatch.setattr(finished.Path, "read_text", _noted(finished.Path.read_text, read))
    page = render_evaluations([*read_finished(tmp_path), *read_finished(tmp_path / "p")])
    assert "<h2>own</h2>" in page and "<h2>own, 16 frames at most</h2>" in page
    assert sorted(path.name for path in read).count("scores.json") == 2


def _noted(read_text, names):
    def noting(self, *arguments, **options):
        names.append(self)
        return read_text(self, *arguments, **options)

    return noting


def test_subtitles_stand_under_the_frames(tmp_path):
    """Those that the model read, and after which frame: one that no frame falls into is not said."""
    make_video(tmp_path / "clip.mp4", 40, fps=4)
    said = [[0.5, 1.5, "a <b> harbour"], [4.0, 5.0, "a ship"], [90.0, 91.0, "nobody sees it"]]
    request = Request("What?", videos=({"video": str(tmp_path / "clip.mp4"), "subtitles": said},))
    page = media_figures(request, Sampling(fps=1.0), lambda request: request)
    assert "video: subtitles between its frames: 2" in page
    assert re.findall(r"<li>(.*?)</li>", page) == [
        "after frame 2 of 10: a &lt;b&gt; harbour",
        "after frame 5 of 10: a ship",
    ]


def test_no_evaluation(tmp_path):
    for text in ("", "[]", "{}", '{"published": "mvbench"}'):
        (tmp_path / "scores.json").write_text(text)
        (tmp_path / "answers.jsonl").write_text("{}\n")
        with pytest.raises(UserError, match="no finished evaluation"):
            read_finished(tmp_path)

"""A benchmark from its file to a table: what is wrong is listed, what was answered is not asked again."""

import json

import pytest

from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import _INSTRUCTION, read_benchmark
from megatron_eagle.evaluation.finished import read_finished
from megatron_eagle.evaluation.judge import Judge, UnusableJudge
from megatron_eagle.evaluation.report import render_evaluations
from megatron_eagle.evaluation.runner import (
    count_readings,
    render_scores,
    run_benchmark,
    tabulate,
    write_scores,
)
from megatron_eagle.inference.generate import Sampling
from tests.convert.hf_folder import write_hf_folder
from tests.data.helpers import make_image, make_video, write_jsonl
from tests.eagle_video.helpers import call_tool
from tests.eagle_video.server import serving

CHOICE = {"metric": "choice", "options": ["red", "blue"]}
LINES = [
    {"id": "c1", "question": "Colour?", "answer": "B", "category": "short", **CHOICE},
    {"id": "c2", "question": "Shade?", "answer": "red", "category": "long", **CHOICE},
    {"id": "c3", "question": "Tint?", "answer": "A", "category": "long", **CHOICE},
    {"id": "d1", "question": "Name?", "answer": ["kitten"], "metric": "anls", "images": ["a.png"]},
    {
        "id": "g1",
        "question": "When?",
        "answer": [5, 15],
        "metric": "grounding",
        "videos": [{"video": "v.mp4"}],
    },
    {"id": "g2", "question": "And?", "answer": [0, 10], "metric": "grounding", "videos": ["v.mp4"]},
    {"id": "m1", "question": "Missing?", "metric": "exact"},
    {"id": "c1", "question": "Twice?", "answer": "x", "metric": "exact"},
    {"id": "b1", "question": "Bad?", "answer": "C", **CHOICE},
    "{",
]
REPLIES = {
    "Colour?": "B",
    "Shade?": "B",
    "Tint?": "(A)",
    "Name?": "sitten",
    "When?": "0 to 10",
    "And?": "0-9.5",
}


class _Model:
    def __init__(self, fails_at: str = ""):
        self.asked, self.fails_at = [], fails_at

    def answer(self, request, sampling):
        first = request.prompt.split("\n")[0]
        if first == self.fails_at:
            raise KeyboardInterrupt
        self.asked.append(request)
        return REPLIES[first]


def test_benchmark_to_table_and_back_again(tmp_path):
    questions, problems = read_benchmark(write_jsonl(tmp_path / "b.jsonl", LINES))
    assert [p.line for p in problems] == [7, 8, 9, 10]
    assert [p.reason.split(" ")[0] for p in problems[:3]] == ["there", "the", "the"]
    model, folder = _Model(fails_at="Name?"), tmp_path / "o"

    def run(model, about="x"):
        return tabulate(
            run_benchmark(lambda: model, questions, problems, folder, Sampling(), {"model": about})
        )

    with pytest.raises(KeyboardInterrupt):
        run(model)
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"id": "d1", "ans')  # killed while it wrote
    again = _Model()
    rows = {(r.category, r.metric): r for r in run(again)}
    assert len(model.asked) == 3 and len(again.asked) == 3
    assert again.asked[0].images == (str(tmp_path / "a.png"),)
    assert again.asked[1].videos == ({"video": str(tmp_path / "v.mp4")},)
    assert model.asked[0].prompt == (
        "Colour?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    assert rows["(all)", "choice"].score == pytest.approx(2 / 3) and rows["long", "choice"].score == 0.5
    assert rows["all", "anls"].score == pytest.approx(5 / 6)
    grounding = rows["all", "grounding"]
    assert grounding.score == pytest.approx((1 / 3 + 0.95) / 2) and grounding.recalls == (1.0, 0.5, 0.5)
    table = render_scores(list(rows.values()))
    assert "66.67" in table and "64.17  R@0.3 100.00  R@0.5 50.00" in table
    assert len((folder / "dropped.jsonl").read_text().splitlines()) == 4

    assert list(rows.values()) == run(None)  # nothing left to ask: no model is made
    with pytest.raises(UserError, match="another evaluation"):
        run(again, about="y")


def test_files_without_questions(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_benchmark(tmp_path / "none.jsonl")
    path = write_jsonl(tmp_path / "b.jsonl", [{"question": "?", "metric": "guess", "answer": 1}])
    with pytest.raises(UserError, match="'guess' is none of"):
        read_benchmark(path)


def test_a_limited_run_goes_on_with_more(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = write_jsonl(tmp_path / "b.jsonl", LINES[:3])
    asked = []

    def answer(request):
        asked.append(request)
        return "B"

    with serving(answer) as server:
        served = ["run", "--endpoint", server.url, "--model", "m", "--benchmark", path, "--output", tmp_path]
        for limit, score in ((1, "100.00"), (3, "33.33"), (2, "50.00")):
            done = call_tool("evaluate", *served, "--limit", limit)
            assert done.returncode == 0 and score in done.stdout.splitlines()[-1], done.stderr
    assert len(asked) == 3
    away = call_tool("evaluate", *served[:-1], tmp_path / "p")  # the server is gone
    assert away.returncode == 2 and "no question was answered" in away.stderr
    assert "cannot be reached" in away.stderr
    served[5:7] = ["--published", "perception-test", "--data", tmp_path]
    tiled = call_tool("evaluate", *served)
    assert tiled.returncode == 2 and "frames are tiled" in tiled.stderr


def test_an_export_is_evaluated(tmp_path):
    import_hf(write_hf_folder(tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    make_image(tmp_path / "a.png", (64, 48))
    make_video(tmp_path / "v.mp4", 16, fps=4)
    lines = [*LINES[:6], {**LINES[3], "id": "d2", "images": ["no.png"]}]
    arguments = ["run", "--hf", tmp_path / "hf", "--benchmark", write_jsonl(tmp_path / "b.jsonl", lines)]
    arguments += ["--output", tmp_path / "o", "--max-new-tokens", 4]
    done = call_tool("evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    assert "grounding" in done.stdout and "1 questions in no score" in done.stdout
    answers = [json.loads(line) for line in (tmp_path / "o" / "answers.jsonl").open()][1:]
    assert [a["id"] for a in answers] == ["c1", "c2", "c3", "d1", "g1", "g2"]
    assert all(isinstance(a["answer"], str) and 0 <= a["score"] <= 1 for a in answers)
    again = call_tool("evaluate", *arguments)
    assert again.stdout == done.stdout


class _Says:
    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def answer(self, request, sampling):
        self.asked.append(request.prompt)
        return self.replies.pop(0)


class _Away:
    def answer(self, request, sampling):
        raise UserError("away")


def test_free_answers_are_judged(tmp_path):
    line = {"id": "j", "question": "Where?", "answer": ["sofa", "couch"], "metric": "judge"}
    questions, problems = read_benchmark(write_jsonl(tmp_path / "b.jsonl", [line]))

    def run(judge, folder="o"):
        model = _Says("on the couch")
        return run_benchmark(
            lambda: model, questions, problems, tmp_path / folder, Sampling(), {}, judge=judge
        )

    with pytest.raises(UserError, match="1 answers are compared by a language model"):
        run(None)
    judge = _Says("I would say so", "4")
    assert [score for _, score in run(Judge(judge))] == [0.75]
    assert all(text in judge.asked[0] for text in ("Where?", "sofa; couch", "Answer: on the couch"))
    with pytest.raises(UnusableJudge, match="but 'no idea'"):
        run(Judge(_Says(*["no idea"] * 3)), "p")
    assert len((tmp_path / "p" / "answers.jsonl").read_text().splitlines()) == 1  # asked again next time
    with pytest.raises(UnusableJudge, match="the judge fails: away"):  # it does not cost all questions
        run(Judge(_Away()), "p")
    assert [score for _, score in run(Judge(_Says("5")), "p")] == [1.0]
    assert Judge(_Says()).mark("judge", "Q", ["a"], " ") == 0  # nothing said: nothing asked


def test_it_is_said_who_read_an_answer(tmp_path):
    lines = [
        {"id": str(i), "question": "How many?", "metric": "mathvista"}
        | {"answer": {"value": "7", "kind": "integer"}}
        for i in range(3)
    ]
    questions, problems = read_benchmark(write_jsonl(tmp_path / "b.jsonl", lines))

    def run(folder, judge=None):
        model = _Says("7", "seven birds", "8")
        scored = run_benchmark(
            lambda: model, questions, problems, tmp_path / folder, Sampling(), {}, judge=judge
        )
        return [score for _, score in scored], count_readings(tmp_path / folder)

    assert run("o") == ([1, 1, 0], {"as it is": 2, "by rule": 1})
    assert run("p", Judge(_Says("9"))) == ([1, 0, 0], {"as it is": 2, "by judge": 1})


@pytest.mark.parametrize("metric", sorted(_INSTRUCTION.keys() - {"submission"}))
def test_a_question_without_a_right_answer_is_asked_and_wrong(tmp_path, metric):
    line = {"id": "1", "question": "Which?", "metric": metric, "unanswerable": True, "evidence": ["v.mp4"]}
    for options in ([], ["red", "blue"]) if metric == "mathvista" else (["red", "blue"],):
        path = write_jsonl(tmp_path / "b.jsonl", [line | {"options": options}])
        questions, problems = read_benchmark(path)
        folder = tmp_path / f"o{len(options)}"
        judge = Judge(_Says())
        scored = run_benchmark(
            lambda: _Says("red, 1 to 2"), questions, problems, folder, Sampling(), {}, judge=judge
        )
        assert [score for _, score in scored] == [0.0] and count_readings(folder) == {}
        write_scores(folder, {"benchmark": str(path), "model": "m"}, tabulate(scored), None)
        assert "expected: none" in render_evaluations(read_finished(folder))


def test_what_an_authors_server_scores_is_no_question_of_ones_own(tmp_path):
    line = {"question": "Which?", "metric": "submission", "options": ["red", "blue"]}
    with pytest.raises(UserError, match="submission.*hourvideo-test"):
        read_benchmark(write_jsonl(tmp_path / "b.jsonl", [line]))


def test_a_published_benchmark_over_several_numbers_of_frames(tmp_path):
    import_hf(write_hf_folder(tmp_path / "source"), tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    data = tmp_path / "data"
    data.mkdir()
    make_video(data / "A1.mp4", 40, fps=4)
    (data / "charades_sta_test.txt").write_text("A1 0.0 5.0##a cat.\nNONE 0.0 5.0##a dog.\n")
    arguments = ["--hf", tmp_path / "hf", "--published", "charades-sta", "--data", data]
    arguments += ["--output", tmp_path / "o", "--max-new-tokens", 2, "--frames", 8, 16]
    done = call_tool("evaluate", "frames", *arguments)
    assert done.returncode == 0, done.stderr
    assert "16 frames at most" in done.stdout and "charades-sta" in done.stdout and "65.90" in done.stdout
    assert (tmp_path / "o" / "frames.png").stat().st_size > 5000
    dropped = (tmp_path / "o" / "frames-8" / "dropped.jsonl").read_text()
    assert "NONE" in dropped and len(dropped.splitlines()) == 1
    table = call_tool("evaluate", "table", tmp_path / "o" / "frames-8", tmp_path / "o" / "frames-16")
    assert table.returncode == 0 and table.stdout.count("\ncharades-sta ") == 2
    wrong = call_tool("evaluate", "table", tmp_path)
    assert wrong.returncode == 2 and "no scores of a published benchmark" in wrong.stderr


def test_every_published_benchmark_is_listed():
    done = call_tool("evaluate", "list")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 34
    assert "video-mme" in done.stdout and "72.4" in done.stdout

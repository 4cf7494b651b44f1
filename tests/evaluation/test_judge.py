"""What a judge is asked, and which of its replies are marks."""

import re

import pytest

from megatron_eagle.evaluation.benchmarks import question_from
from megatron_eagle.evaluation.judge import SCALES, Judge, UnusableJudge


class _Says:
    def __init__(self, *replies):
        self.replies, self.asked, self.seen = list(replies), [], []

    def answer(self, request, sampling):
        self.asked.append(request.prompt)
        self.seen.append(request.videos)
        return self.replies.pop(0)


@pytest.mark.parametrize(
    ("metric", "reply", "score"),
    [
        ("judge", "1", 0),
        ("judge", "Mark: 4.", 0.75),
        ("judge-openeqa", "5", 1),
        ("judge-openeqa", "3", 0.5),
        ("judge-mm-vet", "0.4", 0.4),
        ("judge-mm-vet", "1.0", 1),
        ("judge-mm-vet", "0", 0),
        ("judge-mmb-video", "0", 0),
        ("judge-mmb-video", "2", 2 / 3),
        ("judge-mmb-video", "3/3", 1),
        ("judge-cg-bench", "0", 0),
        ("judge-cg-bench", "1", 1),
    ],
)
def test_marks(metric, reply, score):
    assert Judge(_Says(reply), runs=1).mark(metric, "Q", ["a"], "b") == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "reply", "wanted"),
    [
        ("judge", "0", "a whole number from 1 to 5"),
        ("judge-openeqa", "10", "a whole number from 1 to 5"),
        ("judge-openeqa", "4.5", "a whole number from 1 to 5"),
        ("judge-mm-vet", "5", "a number from 0 to 1"),
        ("judge-mmb-video", "good", "a whole number from 0 to 3"),
    ],
)
def test_what_is_no_mark(metric, reply, wanted):
    with pytest.raises(UnusableJudge, match=f"with {wanted}, but"):
        Judge(_Says(*[reply] * 3)).mark(metric, "Q", ["a"], "b")
    model = _Says(reply, "1")
    assert Judge(model, runs=1).mark(metric, "Q", ["a"], "b") in (0, 1 / 3, 1)
    assert model.asked[1] == f"{model.asked[0]}\n\nReply with {wanted} alone."


@pytest.mark.parametrize("metric", SCALES)
def test_all_that_is_known_is_asked(metric):
    model = _Says("1")
    Judge(model, runs=1).mark(metric, "Who {prediction}?", ["ann<AND>bob", "eve"], "ann. Also")
    asked = model.asked[0]
    assert "Who {prediction}?" in asked and "ann <AND> bob" in asked and "eve" in asked
    assert ("Also" in asked) == (metric != "judge-openeqa")  # OpenEQA cuts after the last period
    assert not re.search(r"\{(question|answer|extra_answers)\}", asked)


def test_a_judge_sees_what_it_cannot_tell():
    """CG-Bench's second step: the parts of the video that hold the clue."""
    parts = [{"video": "v.mp4", "start_time": 1.0, "end_time": 2.0}]
    for reply, score in (("0", 0), ("1", 1)):
        model = _Says("2", reply)
        assert Judge(model).mark("judge-cg-bench", "Colour?", ["white"], "ivory", parts) == score
        assert "white" in model.asked[0] and "white" not in model.asked[1] and "ivory" in model.asked[1]
        assert model.seen == [(), tuple(parts)]
    with pytest.raises(UnusableJudge, match="from 0 to 1"):
        Judge(_Says(*["2"] * 4)).mark("judge-cg-bench", "Colour?", ["white"], "ivory", parts)
    record = {"question": "Colour?", "metric": "judge-cg-bench", "answer": "white"}
    with pytest.raises(ValueError, match='needs "evidence"'):
        question_from(record, "x", 1)
    question = question_from(record | {"evidence": parts}, "x", 1)
    assert question.request.videos == () and question.score("ivory", Judge(_Says("2", "1"))) == 1


def test_mm_vet_is_marked_five_times():
    """As its authors do; the mean counts. Whoever wants another number says so."""
    model = _Says("0.4", "0.6", "0.5", "x", "0.5", "1")
    assert Judge(model).mark("judge-mm-vet", "Q", ["a"], "b") == pytest.approx(0.6)
    assert model.replies == [] and len(set(model.asked)) == 2  # one reply was no mark
    assert Judge(_Says("0.4"), runs=1).mark("judge-mm-vet", "Q", ["a"], "b") == pytest.approx(0.4)
    assert Judge(_Says("1", "5"), runs=2).mark("judge", "Q", ["a"], "b") == pytest.approx(0.5)
    parts = [{"video": "v.mp4"}]
    seen = _Says("2", "0", "1")
    assert Judge(seen, runs=2).mark("judge-cg-bench", "Q", ["a"], "b", parts) == 0.5
    assert Judge(_Says("1")).runs_of({"judge", "choice"}) == 1
    assert Judge(_Says("1")).runs_of({"judge-mm-vet"}) == 5 and Judge(_Says("1"), runs=2).runs_of(set()) == 2


def test_a_prompt_of_ones_own():
    model = _Says("3", " 4 ")
    judge = Judge(model, "{question}|{answer}|{prediction}|{other}")
    assert judge.mark("judge-mmb-video", "Q", ["a", "b"], "c") == 1
    assert model.asked == ["Q|a; b|c|{other}"]
    assert judge.extract("Q", "It is 4") == "4"
    model = _Says("seven")
    assert Judge(model).extract("How many?", "It is seven.") == "seven"
    assert model.asked[0].endswith("Question: How many?\nReply: It is seven.\nAnswer:")

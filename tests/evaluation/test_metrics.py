"""Scorers against values worked out by hand."""

import pytest

from megatron_eagle.evaluation import metrics

OPTIONS = ["A red car", "A blue car", "Two dogs", "None of them"]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(c).", "C"),
        ("(C)", "C"),
        ("D.", "D"),
        ("B. A blue car", "B"),
        ("(A) A red car", "A"),
        ("The answer is C.", "C"),
        ("The correct option is: **D**", "D"),
        ("I think it must be (B), since the sky is blue", "B"),
        ("It is B", "B"),
        ("Answer: b", "B"),
        ("The sky is blue.\nanswer: **b**.\n\nSo it is.", "B"),
        ("The correct answer is (b) a blue one", "B"),
        ("I choose option d.", "D"),
        ("Answer: a", "A"),
        ("Answer: a blue car", "B"),  # an article
        ("I cannot say what the answer is, a", None),
        ("The answer is a", None),  # broken off
        ("A blue car", "B"),  # an article, not the letter A
        ("there are two dogs.", "C"),
        ("A man walks", None),
        ("B or C", None),
        ("(A) or (B)", None),
        ("E", None),  # there are four options
        ("", None),
        ("a red car and a blue car", None),
    ],
)
def test_choice(text, letter):
    assert metrics.extract_choice(text, OPTIONS) == letter
    assert metrics.choice_accuracy(text, OPTIONS, "B") == (letter == "B")


def test_anls():
    assert metrics.anls("Paris", ["paris", "London"]) == 1
    assert metrics.anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)  # the classic: 3 edits
    assert metrics.anls("ab", ["ac"]) == 0.5  # the threshold itself is kept
    assert metrics.anls("ab", ["ac"], threshold=0.51) == 0
    assert metrics.anls("abc", ["abx", "xyz"]) == pytest.approx(2 / 3)
    assert metrics.anls("a  bcx", ["a bcd"]) == pytest.approx(1 - 1 / 6)  # the longer has six with its spaces
    assert metrics.anls("", ["x"]) == 0
    assert metrics.anls(" 12  May ", ["12 may"]) == 1


@pytest.mark.parametrize(
    "text, answer, score",
    [
        ("105", "100", 1),  # 5 % exactly
        ("106", "100", 0),
        ("95", "100", 1),
        ("-100", "100", 0),
        ("5%", "0.05", 1),
        ("1,000", "1000", 0),  # commas make it a text
        ("1,000", "1,000", 1),
        ("1000.", "1,000", 0),
        ("104.", "100", 1),
        (" 5 % ", "5%", 1),  # the number before the percent sign may have a space
        ("5%", "5", 0),
        (" Yes\n", "yes", 1),
        ("Yes.", "yes", 0),
        ("2,0", "2.0", 0),
        ("$7", "7", 0),
        ("no", "yes", 0),
        ("0", "0", 1),  # no relative error at 0: compared as text
        ("0.01", "0", 0),
        ("2.0e0", "2", 1),
    ],
)
def test_relaxed(text, answer, score):
    assert metrics.relaxed_accuracy(text, answer) == score


def test_exact():
    assert metrics.exact_match("The cat!", ["dog", "cat"]) == 1
    assert metrics.exact_match("cats", ["cat"]) == 0
    assert metrics.exact_match("3.5", ["35"]) == 0


def test_words_that_an_answer_holds():
    assert metrics.yes_no("Not so: YES.", "yes") == metrics.yes_no("No, there is none.", "no") == 1
    assert metrics.yes_no("Yes or no", "yes") == metrics.yes_no("", "no") == metrics.yes_no("note", "no") == 0
    assert metrics.contains("It says\nStop here", ["go", "says stop"]) == 1
    assert metrics.contains("stop", ["stop here"]) == metrics.contains("a  b", ["a b"]) == 0
    assert metrics.contains_formula("$x ^ 2\n+Y$", ["x^2 + Y"]) == 1
    assert metrics.contains_formula("x^2+y", ["x^2+Y"]) == 0


@pytest.mark.parametrize(
    "text, interval",
    [
        ("12.0 to 18.5 seconds", (12.0, 18.5)),
        ("From 3s to 7s.", (3.0, 7.0)),
        ("It happens in 00:10 - 01:05.5", (10.0, 65.5)),
        ("[4, 9]", (4.0, 9.0)),
        ("1:00:00 to 1:00:10", (3600.0, 3610.0)),
        ("9 to 4", None),
        ("at 5 seconds", None),
    ],
)
def test_interval(text, interval):
    assert metrics.parse_interval(text) == interval


def test_temporal_iou():
    assert metrics.temporal_iou((0, 10), (5, 15)) == pytest.approx(5 / 15)
    assert metrics.temporal_iou((5, 6), (0, 10)) == pytest.approx(0.1)
    assert metrics.temporal_iou((0, 1), (1, 2)) == metrics.temporal_iou((0, 1), (3, 4)) == 0
    assert metrics.temporal_iou(None, (0, 1)) == 0
    assert metrics.recall_at([0.29, 0.3, 0.7, 1.0], 0.3) == 0.75
    assert metrics.recall_at([], 0.3) == 0

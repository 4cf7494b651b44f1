"""The authors' rules of single benchmarks, against cases worked out by hand."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eagle.evaluation import metrics
from megatron_eagle.evaluation.benchmarks import question_from
from megatron_eagle.evaluation.scoring import mathvista, mmmu, textvqa

TEXTS = st.text(st.sampled_from(string.ascii_letters + string.digits + " .,'%()-/?\n"), max_size=24)
COLOURS = ("red", "dark red", "blue", "green")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Stop-Sign!", "stop sign"),  # a mark inside is a space
        ("stop - sign", "stop sign"),  # beside a space it goes away
        ("Mr. T.", "mr t"),
        ("v1.5.", "v1.5"),
        ("1,000", "1000"),
        ("none of two", "0 of 2"),
        ("eleven", "eleven"),  # only up to ten
        ("dont", "don't"),
        ("don't", "don't"),
        ("mcdonald's", "mcdonald 's"),
        ("wouldntve", "wouldntve"),  # one apostrophe at most is put back
        ("x/b - c", "x b c"),
        ("a/ b/c", "bc"),  # all of a mark go away if one has a space beside it
        ("(5)", "5"),
        ("é\tA\nx", "é x"),
        ("", ""),
    ],
)
def test_textvqa_answers_are_normalised(text, plain):
    assert textvqa.normalise(text) == plain


def test_textvqa_votes():
    assert textvqa.vqa_accuracy("a", ["a"]) == 1 and textvqa.vqa_accuracy("b", ["a"] * 10) == 0
    for votes, score in ((1, 0.3), (2, 0.6), (3, 0.9), (4, 1)):  # 3 of 10: without one of them 2/3, else 1
        answers = ["Two"] * votes + [f"other {i}" for i in range(10 - votes)]
        assert textvqa.vqa_accuracy("2", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B) or rather (C)", "C"),  # the last one
        ("C, no: (A)", "A"),  # brackets come first
        ("It is B because of C in it", "C"),
        ("I would say that it is dark red here", "A"),  # "red" begins later than "dark red"
        ("I would say that it is blue here", "C"),
        ("it is blue", None),  # texts count in replies of more than five words
        ("B. dark red", None),
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_letters(text, letter):
    def none(letters):
        return None

    assert mmmu.chosen(text, COLOURS, none) == letter


def test_mmmu_guesses_stay_the_same():
    keys = [f"validation_Art_{i}" for i in range(400)]
    guesses = [mmmu.guess("ABCD", key) for key in keys]
    assert guesses == [mmmu.guess("ABCD", key) for key in keys]
    assert all(70 < guesses.count(letter) < 130 for letter in "ABCD")
    assert mmmu.letter_accuracy("no idea", COLOURS, guesses[0], keys[0]) == 1


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("36 watts", ["36"], 1),
        ("So the total is $1,234.", ["1234"], 1),
        ("So the total is $1,234.50.", ["1234.5"], 0),  # commas and decimals are not read together
        ("The answer is 3.504", ["3.5"], 1),  # two decimal places
        ("The answer is 3.51", ["3.5"], 0),
        ("x = 4\ny = 5", ["5"], 1),
        ("x = 4\ny = 5", ["4"], 0),  # an equation counts in the last line only
        ("x is 4\ny is 5", ["4"], 1),
        ("about 1.5e3 people", ["1500"], 1),
        ("The Mona Lisa.", ["mona lisa"], 1),
        ("It is b or c", ["b"], 1),
        ("It is a cab", ["b"], 0),  # a single letter needs a space at its side
        ("-7", ["7"], 0),
        ("", ["7"], 0),
        ("one of two", ["three", "of"], 1),
    ],
)
def test_mmmu_short_answers(text, answers, score):
    assert mmmu.open_accuracy(text, answers) == score


ANGLES = ("60°", "70°", "8", "18")
TEXT, WHOLE = mathvista.Wanted("70°", "text"), mathvista.Wanted("7", "integer")
FLOAT, LIST = mathvista.Wanted("1.2", "float", 1), mathvista.Wanted("[1, 2]", "list")


@pytest.mark.parametrize(
    ("extracted", "wanted", "form"),
    [
        ("B", TEXT, "70°"),
        ("(b) 70", TEXT, "70°"),
        ("b", TEXT, "8"),  # the authors know no lone small letter: the first of those with one edit
        ("70", TEXT, "70°"),  # the nearest
        ("E", TEXT, "8"),  # no such letter
        ("", TEXT, "8"),  # the fewest edits from nothing
        ("7.9", WHOLE, "7"),  # cut, not rounded
        ("7 m", WHOLE, None),
        ("inf", WHOLE, None),
        ("1.249", FLOAT, "1.2"),
        ("[1, 2]", LIST, "[1, 2]"),
        ("[1,2]", LIST, "[1,2]"),
    ],
)
def test_mathvista_forms(extracted, wanted, form):
    assert mathvista.normalised(extracted, wanted, ANGLES) == form
    assert mathvista.accuracy(extracted, wanted, ANGLES) == (form == wanted.value)


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("It must be (B).", TEXT, "B"),
        ("b", TEXT, "B"),
        ("The angle measures 60°", TEXT, "A"),
        ("no idea", TEXT, "no idea"),
        ("There are seven birds in two trees.", WHOLE, "7"),
        ("3 + 4 = 7, as 3 and 4 were given", WHOLE, "7"),
        ("7 of 9", WHOLE, "9"),
        ("The sum is 7. I used 2 steps.", WHOLE, "7"),
        ("So it is $1,234.", WHOLE, "1234"),
        ("It is -0.5 m", FLOAT, "-0.5"),
        ("\\boxed{7} in 3 steps", WHOLE, "7"),
        ("none", WHOLE, "none"),
        ("From [1, 3] to [1, 2].", LIST, "[1, 2]"),
    ],
)
def test_mathvista_by_rule(text, wanted, found):
    assert mathvista.by_rule(text, wanted, ANGLES if wanted.kind == "text" else ()) == found


def test_mathvista_asks_a_judge_only_where_its_authors_do():
    class Reader:
        asked = ()

        def extract(self, asked, answer):
            self.asked += (asked, answer)
            return "70°"

    record = {"question": "Angle?", "metric": "mathvista", "options": list(ANGLES)}
    question = question_from(record | {"answer": {"value": "70°", "kind": "text"}}, "x", 1)
    assert question.request.prompt.splitlines()[1:3] == ["A. 60°", "B. 70°"]
    judge = Reader()
    assert (
        question.score("70°", judge) == 1 and question.score("60°", judge) == question.score("", judge) == 0
    )
    assert judge.asked == ()
    assert question.score("60° and more", judge) == 1 and judge.asked == (
        question.request.prompt,
        "60° and more",
    )
    assert question.score("60° and more") == 0
    number = {"question": "Length?", "metric": "mathvista", "answer": {"value": "7", "kind": "integer"}}
    assert question_from(number, "x", 1).score(" 7 ", judge) == 1 and len(judge.asked) == 2


@pytest.mark.parametrize(
    ("answer", "options", "reason"),
    [
        ("70°", ANGLES, "the answer must be"),
        ({"value": "70°", "kind": "angle"}, ANGLES, "the answer must be"),
        ({"value": "71°", "kind": "text"}, ANGLES, "is not one of the options"),
        ({"value": "7", "kind": "text"}, (), "is not one of the options"),
        ({"value": "7", "kind": "integer"}, ANGLES, "is not one of the options"),
        ({"value": "7.5", "kind": "integer"}, (), "is not written as integer"),
        ({"value": "1.25", "kind": "float", "precision": 1}, (), "is not written as float"),
    ],
)
def test_a_mathvista_answer_that_none_could_give_is_refused(answer, options, reason):
    record = {"question": "Q", "metric": "mathvista", "answer": answer, "options": list(options)}
    with pytest.raises(ValueError, match=reason):
        question_from(record, "x", 1)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.lists(TEXTS, min_size=2, max_size=5))
def test_scores_are_bounded_and_the_true_answer_is_right(text, answer, options):
    plain = textvqa.normalise(answer)
    assert plain == plain.lower() and textvqa.vqa_accuracy(answer, [answer] * 10) == 1
    assert 0 <= metrics.anls(text, [answer]) <= 1 and metrics.anls(text, [answer]) in (
        0,
        pytest.approx(metrics.anls(answer, [text])),
    )
    assert metrics.anls(answer, [answer]) == 1
    assert metrics.relaxed_accuracy(answer, answer.strip()) == 1
    assert mmmu.chosen(text, options, min) in "ABCDE"[: len(options)]
    wanted = mathvista.Wanted(options[0], "text")
    form = mathvista.normalised(text, wanted, options)
    assert form in options
    if len(form.strip()) > 1 and "(" not in form and form == form.strip():
        assert mathvista.normalised(form, wanted, options) == form
    distance = metrics.levenshtein(text, answer)
    assert distance == metrics.levenshtein(answer, text)
    assert abs(len(text) - len(answer)) <= distance <= max(len(text), len(answer))

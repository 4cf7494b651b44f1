"""TextVQA: the answer as the VQA challenge's server normalises it, and its share of ten people's votes.

The rule is that of `EvalAIAnswerProcessor` and `TextVQAAccuracyEvaluator` in facebookresearch/mmf,
`mmf/utils/m4c_evaluators.py` (Singh et al., "Towards VQA Models That Can Read"). What looks odd
there counts too: a mark goes away if it has a space beside it anywhere in the answer and is a space
otherwise, and a word whose apostrophe is missing gets it back while `'s` is a word of its own.
"""

import re
from collections.abc import Sequence

from megatron_eagle.evaluation.metrics import NUMBER_WORDS

_ARTICLES = ("a", "an", "the")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS[:11])}
_MARKS = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
# A word that lost one of its apostrophes gets it back; "she's", "we'll" and others are not in the rule.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've"""


def _with_apostrophes() -> dict[str, str]:
    """Every form of those words with one apostrophe missing -> the word."""
    lost = {w[:i] + w[i + 1 :]: w for w in _CONTRACTED.split() for i, sign in enumerate(w) if sign == "'"}
    return lost | {"somebody'd": "somebodyd"}  # the other way round, as the server has it


_CONTRACTIONS = _with_apostrophes()


def normalise(text: str) -> str:
    """An answer in lower case, without articles and most punctuation, with small numbers as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """The mean over every choice of all people but one of min(1, how many of them gave the answer / 3).

    Where a single person answered, 1 for the same answer (a benchmark of one's own; TextVQA has ten).
    """
    text, answers = normalise(text), [normalise(answer) for answer in answers]
    if len(answers) == 1:
        return float(text == answers[0])
    matches = answers.count(text)
    # Leaving out one who agrees leaves one match fewer; that happens `matches` times.
    with_one_fewer, with_all = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * with_one_fewer + (len(answers) - matches) * with_all) / len(answers) if matches else 0.0

"""MathVista: what a reply answers, in the form that the question asks for.

The authors (lupantech/MathVista; Lu et al., "MathVista") score in two steps. `normalised` and
`accuracy` are the second, `evaluation/calculate_score.py`: the option that the extracted answer names or is
nearest to, or the number cut or rounded as asked, must equal the true answer as text. The first step,
`evaluation/extract_answer.py`, takes a reply as it is that is an option or a bare number, and has a language
model extract the answer from any other. `as_it_is` is the former; for the latter there are a judge
(`evaluation.judge`) and, without one, `by_rule`, which is ours: its scores are not the authors'.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_eagle.evaluation.metrics import NUMBER_WORDS, extract_choice, levenshtein

AnswerKind = Literal["text", "integer", "float", "list"]
ANSWER_KINDS = ("text", "integer", "float", "list")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?!\d)")
_ASSIGNED = re.compile(r"(?i)(?:answer|result|value|total|is|are|equals|be|boxed|=|≈)\W*$")
_LIST = re.compile(r"\[[^\[\]]*\]")


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        value: the true answer as the authors write it; an option for "text".
        precision: decimal places of a "float".
    """

    value: str
    kind: AnswerKind
    precision: int = 0

    @property
    def instruction(self) -> str:
        """How to answer, in few words: the authors ask for the same forms, at the end of a longer reply."""
        return {
            "text": "Answer with the option's letter from the given choices directly.",
            "integer": "Answer with an integer alone, such as 1.",
            "float": f"Answer with a number of {self.precision} decimal places alone.",
            "list": "Answer with a list alone, such as [1, 2, 3].",
        }[self.kind]


def accuracy(extracted: str, wanted: Wanted, options: Sequence[str]) -> float:
    """1 if the extracted answer, normalised, is the true one."""
    return float(normalised(extracted, wanted, options) == wanted.value)


def normalised(extracted: str, wanted: Wanted, options: Sequence[str]) -> str | None:
    """An extracted answer as the form that is asked for; None if it is no number where one must be.

    The first letter in brackets is an option's, as is a capital letter alone; any other text stands for the
    option with the least edits to it, also an empty one.
    """
    if wanted.kind == "text":
        text = extracted.strip()
        if found := re.search(r"\(([a-zA-Z])\)", text):
            text = found[1].upper()
        place = ord(text) - ord("A") if len(text) == 1 else -1
        if 0 <= place < len(options):
            return options[place]
        return min(options, key=lambda option: levenshtein(text, option))
    if wanted.kind == "list":
        return extracted
    try:
        value = float(extracted)
        return str(int(value)) if wanted.kind == "integer" else str(round(value, wanted.precision))
    except (ValueError, OverflowError):
        return None


def as_it_is(text: str, wanted: Wanted, options: Sequence[str]) -> str | None:
    """A reply that needs no extraction: an option, a bare number of the kind asked for, or nothing."""
    if not text or (wanted.kind == "text" and text in options):
        return text
    try:
        if wanted.kind == "integer":
            return str(int(text))
        if wanted.kind == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def by_rule(text: str, wanted: Wanted, options: Sequence[str]) -> str:
    """What a reply answers, read off without a language model; the whole reply where nothing is found.

    A letter or an option's text, else the number after the last "is", "=" and the like, or the last number,
    written in digits or as a word up to twenty; of a list the last in brackets.
    """
    if wanted.kind == "text":
        return extract_choice(text, options) or text
    if wanted.kind == "list":
        lists = _LIST.findall(text)
        return lists[-1] if lists else text
    for number, word in enumerate(NUMBER_WORDS):
        text = re.sub(rf"(?i)\b{word}\b", str(number), text)
    numbers = [match for match in _NUMBER.finditer(text) if match[0].strip("-")]
    assigned = [match for match in numbers if _ASSIGNED.search(text, 0, match.start())]
    found = (assigned or numbers)[-1:]
    return found[0][0].replace(",", "") if found else text

"""MMMU: the letter or the short answer that a reply ends in.

The rules are those of MMMU-Benchmark/MMMU, `mmmu/utils/eval_utils.py` (Yue et al., "MMMU"): of
letters that are named the last counts, a reply that names none is a guess, and a short answer is right if it
stands in one of the reply's closing parts. What looks odd there counts too: sentences are not told apart,
since the reply is in lower case by then, and `B. text` names no letter.
"""

import random
import re
from collections.abc import Callable, Sequence

_ENDS = ",.!?;:'"
_CLOSING = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# 1,234,567 and 1.2e-3 and 12.5; each is looked for in the whole text.
_FORMS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][-+]?\d+"),
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][-+]?\d)(?![,\d])"),
)
SEED = 42


def guess(letters: Sequence[str], key: str) -> str:
    """A letter for a reply that names none: always the same for the question `key`.

    The authors draw from one stream of random numbers, so that their guesses depend on the order of
    questions; on average both are right as often.
    """
    return random.Random(f"{SEED} {key}").choice(letters)


def chosen(text: str, options: Sequence[str], pick: Callable[[Sequence[str]], str]) -> str:
    """The letter of a reply; `pick` guesses where none is named.

    Letters in brackets come first, then letters between spaces; in replies of more than five words the
    options' texts. Of several the one whose last mention is the last.
    """
    for end in _ENDS:
        text = text.strip(end)
    text = f" {text} "
    letters = [chr(65 + i) for i in range(len(options))]
    for form in ("({})", " {} "):
        last = {letter: text.rfind(form.format(letter)) for letter in letters}
        if max(last.values()) >= 0:
            return max(letters, key=lambda letter: last[letter])
    last = {letter: text.lower().rfind(o.lower()) for letter, o in zip(letters, options, strict=True)}
    if len(text.split()) > 5 and max(last.values()) >= 0:
        return max(letters, key=lambda letter: last[letter])
    return pick(letters)


def letter_accuracy(text: str, options: Sequence[str], answer: str, key: str) -> float:
    """1 if the reply's letter is `answer`; a reply without one is guessed (see `guess`)."""
    return float(chosen(text, options, lambda letters: guess(letters, key)) == answer)


def open_accuracy(text: str, answers: Sequence[str]) -> float:
    """1 if an accepted answer stands in a closing part of the reply, or is a number there, to 2 decimals."""
    wanted = {form for answer in answers for form in _normalised(answer)}
    words = [form for form in wanted if isinstance(form, str)]
    for part in _closing_parts(text):
        for found in (part, *_numbers(part)):
            for form in _normalised(found):
                if form in wanted if isinstance(form, float) else any(word in form for word in words):
                    return 1.0
    return 0.0


def _closing_parts(text: str) -> list[str]:
    """Of each line the shortest text after a word such as "is" or "answer"; the whole if there is none."""
    whole = text.strip().strip(".").lower()
    lines = whole.split("\n")
    parts = []
    for number, line in enumerate(lines, 1):
        shortest = ""
        for word in (*_CLOSING, "=") if number == len(lines) else _CLOSING:
            if word in line:
                tail = line.split(word)[-1].strip()
                shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in set(_ENDS):
            parts.append(shortest)
    return parts or [whole]


def _numbers(text: str) -> list[str]:
    return [number for form in _FORMS for number in form.findall(text)]


def _normalised(text: str) -> list[str | float]:
    """A number to 2 decimals, or the text in lower case; a single letter with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]

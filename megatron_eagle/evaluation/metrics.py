"""Scorers of single answers, all in [0, 1]: choices, words, numbers, formulas, parts of a video."""

import re
import unicodedata
from collections.abc import Sequence

from megatron_eagle.data.sample import clock_seconds

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = _NUMBERS.split()
_CLOCK = r"\d+(?::\d{1,2}){0,2}(?:\.\d+)?"
_INTERVAL = re.compile(
    rf"({_CLOCK})\s*(?:s|sec|seconds?)?\s*(?:-|–|—|to|and|until|,)\s*({_CLOCK})", re.IGNORECASE
)


def extract_choice(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses among options A, B, ...; None if it chooses none or several.

    Looked for in this order: the answer is one letter, in either case; says "answer is B" or, at the end of a
    line, "Answer: b"; begins with one
    as in `B. text` or `(B) text`; holds exactly one letter in brackets, or one bare letter that is no word;
    is or holds the text of exactly one option.

    One reading for all benchmarks of choices but MMMU and MathVista: their authors' scripts differ in what
    they make of longer replies, and several ask a language model there.
    """
    letters = LETTERS[: len(options)]
    text = text.strip()
    whole = re.match(rf"^\(?([{letters}])\)?[.:,]?$", text.upper())
    said = set(
        re.findall(
            rf"(?i:answer|option|choice)(?:\s+(?i:is|would be))?\s*:?\s*\**\(?([{letters}])\b(?!['’])", text
        )
    )
    said |= {letter.upper() for letter in _small_letters(text, letters)}
    if whole or len(said) == 1:
        return whole[1] if whole else said.pop()
    bracketed = set(re.findall(rf"\(([{letters}])\)", text))
    if len(bracketed) > 1:
        return None
    if begins := re.match(rf"^([{letters}])(?:\)|[.:,](?=\s))", text):
        return begins[1]
    # "A" and "I" are also words: bare letters count only where they cannot be one.
    bare = set(re.findall(rf"\b([{letters[1:]}])\b", text)) - {"I"}
    if found := bracketed or bare:
        return found.pop() if len(found) == 1 else None
    plain = _plain(text)
    held = [(letter, _plain(option)) for letter, option in zip(letters, options, strict=True)]
    same = [letter for letter, option in held if option == plain]
    if len(same) == 1:
        return same[0]
    inside = [letter for letter, option in held if option and f" {option} " in f" {plain} "]
    return inside[0] if len(inside) == 1 else None


def _small_letters(text: str, letters: str) -> list[str]:
    """Lower-case letters that are said to be the answer, where they cannot be the words "a" and "i"."""
    small = letters.lower()
    no_words = "".join(set(small) - {"a", "i"})
    said = r"\b(?i:answer|option|choice)(?i:\s+is|\s+would\s+be)?"
    last = r"\)?\**[.,:]?[ \t]*$"
    forms = (
        rf"{said}\s*\**:?\s*\**\(([{small}])\)",
        rf"{said}\s*\**:\s*\**([{small}]){last}",
        rf"{said}\s+\**([{no_words}]){last}",
    )
    return [letter for form in forms for letter in re.findall(form, text, re.MULTILINE)]


def choice_accuracy(text: str, options: Sequence[str], answer: str) -> float:
    """1 if the answer chooses the letter `answer`, else 0."""
    return float(extract_choice(text, options) == answer)


def anls(text: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer (DocVQA, InfoVQA).

    The best over the accepted answers of 1 - distance / longer length, 0 where that is below the threshold.
    Case and the number of spaces do not count in the distance. Biten et al., "Scene Text Visual Question
    Answering", and the evaluation script of the Robust Reading Competition (challenge 17), which
    takes the lengths before spaces are taken out.
    """
    best = 0.0
    for answer in answers:
        distance = levenshtein(*(" ".join(t.lower().split()) for t in (text, answer)))
        similarity = 1 - distance / max(len(text), len(answer), 1)
        best = max(best, similarity if similarity >= threshold else 0.0)
    return best


def relaxed_accuracy(text: str, answer: str, tolerance: float = 0.05) -> float:
    """1 if a number is within 5 % of the true one, or a text equal to it but for case (ChartQA).

    Masry et al., "ChartQA", section 5.1, as `relaxed_correctness` in google-research/pix2struct,
    `pix2struct/metrics.py`, reads it: "5%" is 0.05, a number with commas or a unit is a text, as is any
    number where the true one is 0, and a final period or comma counts in a text. White space around the
    answer does not, as in VLMEvalKit.
    """
    text = text.strip()
    value, truth = _number(text), _number(answer)
    if value is not None and truth:
        return float(abs(value - truth) / abs(truth) <= tolerance)
    return float(text.lower() == answer.lower())


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones, but for case, punctuation and articles (questions of one's
    own, RealWorldQA's short answers)."""
    return float(_plain(text) in {_plain(answer) for answer in answers})


def contains(text: str, answers: Sequence[str]) -> float:
    """1 if an accepted answer is somewhere in the answer, but for case and line breaks.

    OCRBench: Yuliang-Liu/MultimodalOCR, `OCRBench/example.py`.
    """
    text, *answers = (line.lower().strip().replace("\n", " ") for line in (text, *answers))
    return float(any(answer in text for answer in answers))


def contains_formula(text: str, answers: Sequence[str]) -> float:
    """`contains` without any spaces and with case, as OCRBench does with formulas."""
    text = "".join(text.split())
    return float(any("".join(answer.split()) in text for answer in answers))


def number_match(text: str, answer: tuple[float, int]) -> float:
    """1 if the last number of the answer, rounded to the decimal places asked for, is the true one."""
    value, places = answer
    found = re.findall(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", text.replace(",", ""))
    return float(bool(found) and round(float(found[-1]), places) == round(value, places))


def yes_no(text: str, answer: str) -> float:
    """1 if the answer holds the true one of the words yes and no, and not the other.

    HallusionBench as open-compass/VLMEvalKit has it, `vlmeval/dataset/utils/yorn.py`; where an answer holds
    neither or both, that asks a language model if it has one, as the authors always do.
    """
    return float(set(re.findall(r"\b(yes|no)\b", text.lower())) == {answer})


def parse_interval(text: str) -> tuple[float, float] | None:
    """The first "X to Y" of an answer in seconds; X and Y are seconds or clock times such as 1:02.5."""
    match = _INTERVAL.search(text)
    return None if match is None else _ordered(match)


def parse_intervals(text: str) -> list[tuple[float, float]]:
    """Every "X to Y" of an answer, as `parse_interval`."""
    return [part for match in _INTERVAL.finditer(text) if (part := _ordered(match)) is not None]


def intervals_iou(predicted: Sequence[tuple[float, float]], true: Sequence[tuple[float, float]]) -> float:
    """Intersection over union of what two lists of intervals cover.

    CG-Bench: CG-Bench/CG-Bench, `run/utils.py`; what cannot be read is 0 here, and VLMEvalKit leaves it out.
    """
    overlap = _covered([(max(a, c), min(b, d)) for a, b in predicted for c, d in true])
    union = _covered([*predicted, *true])
    return overlap / union if union else 0.0


def temporal_iou(predicted: tuple[float, float] | None, true: tuple[float, float]) -> float:
    """Intersection over union of two intervals in seconds; 0 for no prediction.

    Charades-STA: Gao et al., "TALL: Temporal Activity Localization via Language Query".
    """
    if predicted is None:
        return 0.0
    overlap = min(predicted[1], true[1]) - max(predicted[0], true[0])
    union = max(predicted[1], true[1]) - min(predicted[0], true[0])
    return max(0.0, overlap) / union if overlap > 0 else 0.0


def recall_at(ious: Sequence[float], threshold: float) -> float:
    """R@1 at an IoU: the share of predictions whose IoU reaches the threshold; 0 for none."""
    return sum(iou >= threshold for iou in ious) / len(ious) if ious else 0.0


def _ordered(match: re.Match[str]) -> tuple[float, float] | None:
    start, end = (clock_seconds(part) for part in match.groups())
    return (start, end) if start < end else None


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > max(start, reached):
            total += end - max(start, reached)
            reached = end
    return total


def levenshtein(a: str, b: str) -> int:
    """The fewest characters put in, taken out and changed that make one text the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _plain(text: str) -> str:
    """Lower case words without punctuation and articles."""
    text = unicodedata.normalize("NFKC", text).lower()
    words = re.sub(r"[^\w\s.%-]|\.(?!\d)", " ", text).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))

"""Benchmark questions in one JSONL form, and how an answer to each is scored.

A line: `{"id", "question", "answer", "metric", "context"?, "images"?, "videos"?, "options"?, "category"?,
"groups"?, "evidence"?, "max_tiles"?, "frame_tiles"?}`; `context` is text that comes before the question, and
`evidence` videos for the judge alone. Paths are relative to the file. Metrics and their answers:

choice               a letter or an option
anls, exact          a text or a list of accepted ones
contains, formula    the same; found in the answer, for a formula without its spaces
vqa                  a list of what ten people answered
relaxed              a text or number
number               [number, decimal places]
yes_no               yes or no
mmmu                 as choice, and mmmu-open as exact, as MMMU's authors read a reply (see `scoring.mmmu`)
mathvista            {"value", "kind", "precision"?}: one of the options for the kind text, else an integer,
                     float or list as text (see `scoring.mathvista`); `--judge` reads it off
grounding            [start, end] in seconds
intervals            [[start, end], ...] in seconds
submission           none: the letter is for the authors' server (see `submission`)
judge                a text or a list of accepted ones; a language model compares (see `judge`), for
                     judge-openeqa, judge-mm-vet, judge-mmb-video and judge-cg-bench on their authors' scales
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import metrics
from megatron_eagle.evaluation.judge import SCALES, Judge
from megatron_eagle.evaluation.scoring import mathvista, mmmu, textvqa
from megatron_eagle.files import split_lines
from megatron_eagle.inference.generate import Request
from megatron_eagle.problems import LedgerEntry

_SHORT = "Answer the question using a single word or phrase."
_CHOICES = ("choice", "mmmu", "submission")
_INSTRUCTION = {
    **dict.fromkeys(_CHOICES, "Answer with the option's letter from the given choices directly."),
    **dict.fromkeys(("anls", "exact", "relaxed", "vqa", "contains", "number", "mmmu-open"), _SHORT),
    "formula": "Answer with the formula in LaTeX.",
    "yes_no": "Answer with yes or no.",
    "grounding": "Answer with the start and the end in seconds, as in: 12.0 to 18.5 seconds.",
    "intervals": "Answer with start and end of each part in seconds, as in: 2.0 to 8.5, 30.0 to 41.0.",
    **dict.fromkeys(("mathvista", *SCALES), ""),
}
_SCORES: dict[str, Callable[[str, Any], float]] = {
    "anls": metrics.anls,
    "exact": metrics.exact_match,
    "relaxed": metrics.relaxed_accuracy,
    "vqa": textvqa.vqa_accuracy,
    "mmmu-open": mmmu.open_accuracy,
    "contains": metrics.contains,
    "formula": metrics.contains_formula,
    "number": metrics.number_match,
    "yes_no": metrics.yes_no,
    "grounding": lambda text, answer: metrics.temporal_iou(metrics.parse_interval(text), answer),
    "intervals": lambda text, answer: metrics.intervals_iou(metrics.parse_intervals(text), answer),
}


@dataclass(frozen=True)
class Question:
    """One question: what is asked, and what its answer is compared with.

    `groups` name sets of questions that a benchmark counts as right only as a whole.
    """

    id: str
    question: str
    request: Request
    metric: str
    answer: Any
    options: tuple[str, ...] = ()
    category: str = "all"
    groups: tuple[str, ...] = ()
    evidence: tuple[str | dict[str, Any], ...] = ()

    @property
    def scored(self) -> bool:
        """Whether its right answer is known here."""
        return self.metric != "submission"

    def score(self, text: str, judge: Judge | None = None) -> float:
        """The score of an answer in [0, 1]; for `grounding` and `intervals` the temporal IoU."""
        if self.answer == "":
            return 0.0  # its table has no right answer
        if self.metric == "choice":
            return metrics.choice_accuracy(text, self.options, self.answer)
        if self.metric == "mmmu":
            return mmmu.letter_accuracy(text, self.options, self.answer, self.id)
        if self.metric == "mathvista":
            return mathvista.accuracy(self._extracted(text, judge), self.answer, self.options)
        if self.metric in SCALES:
            if judge is None:
                raise UserError("these answers are compared by a language model: name one with --judge")
            return judge.mark(self.metric, self.question, self.answer, text, self.evidence)
        return _SCORES[self.metric](text, self.answer)

    def reading(self, text: str, judge: Judge | None = None) -> str:
        """How an answer is read off a reply where authors leave that to a language model, else nothing."""
        if self.metric != "mathvista" or self.answer == "":
            return ""
        if mathvista.as_it_is(text, self.answer, self.options) is not None:
            return "as it is"
        return "by judge" if judge else "by rule"

    def _extracted(self, text: str, judge: Judge | None) -> str:
        asked_for = (self.answer, self.options)
        if (taken := mathvista.as_it_is(text, *asked_for)) is not None:
            return taken
        return judge.extract(self.request.prompt, text) if judge else mathvista.by_rule(text, *asked_for)


def read_benchmark(path: Path) -> tuple[list[Question], list[LedgerEntry]]:
    """Questions of a file, and a ledger entry for every line that is none (a missing answer, for one).

    Raises:
        UserError: the file cannot be read or holds no question.
    """
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this benchmark: {str(error).splitlines()[0]}") from None
    questions: dict[str, Question] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = _placed(json.loads(line), path.resolve().parent)
            if isinstance(record, dict) and record.get("metric") == "submission":
                raise ValueError("the metric submission is that of --published hourvideo-test alone")
            add_question(questions, record, f"{path}, line {number}", number)
        except (ValueError, UserError) as error:
            problems.append(LedgerEntry(str(path), number, str(error), "bad question"))
    if not questions:
        raise UserError(
            f"{path}: holds no question; the first problem: {problems[0].reason if problems else 'no lines'}"
        )
    return list(questions.values()), problems


def digest_of(questions: Sequence[Question]) -> str:
    """A hash of the questions' names and right answers: answers to others must not go on with them."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.id, question.metric, question.answer, question.options)).encode())
    return digest.hexdigest()


def add_question(found: dict[str, Question], record: Any, where: str, number: int) -> None:
    """Put the question of a record under its id.

    Raises:
        ValueError: as `question_from`, and for an id that is there already.
        UserError: as `question_from`.
    """
    question = question_from(record, where, number)
    if question.id in found:
        raise ValueError(f"the id {question.id!r} appears twice")
    found[question.id] = question


def question_from(record: Any, where: str, number: int) -> Question:
    """The question of a record; `number` names it if it has no id.

    Raises:
        ValueError: question, metric, options or answer are not as they must be.
        UserError: its media cannot be those of a request; `where` is named.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("question"), str):
        raise ValueError('a question needs "question" (text)')
    metric = record.get("metric")
    if metric not in _INSTRUCTION:
        raise ValueError(f"metric {metric!r} is none of {', '.join(_INSTRUCTION)}")
    options = record.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError('"options" must be a list of texts')
    if not 2 <= len(options) <= len(metrics.LETTERS) and metric in _CHOICES:
        raise ValueError(f"{len(options)} options; a choice has 2 to {len(metrics.LETTERS)}")
    if metric in SCALES and SCALES[metric].seen and not record.get("evidence"):
        raise ValueError(f'{metric} needs "evidence": videos that show the answer')
    # What a benchmark's own table has no right option for is asked all the same, and always wrong.
    unanswerable = bool(record.get("unanswerable")) or metric == "submission"
    answer = "" if unanswerable else _answer(record.get("answer"), metric, options)
    context = record.get("context") or ""
    if not isinstance(context, str):
        raise ValueError(f'"context" must be a text, not {type(context).__name__}')
    prompt = [context] * bool(context) + [record["question"].strip()]
    if options and metric in (*_CHOICES, "mathvista"):
        prompt += [f"{letter}. {o}" for letter, o in zip(metrics.LETTERS, options, strict=False)]
    instruction = answer.instruction if isinstance(answer, mathvista.Wanted) else _INSTRUCTION[metric]
    prompt += [instruction] if instruction else []
    asked = {key: record.get(key) for key in ("images", "videos", "max_tiles", "frame_tiles")}
    request = Request.from_record({"prompt": "\n".join(prompt), **asked}, where)
    return Question(
        str(record.get("id", number)),
        record["question"].strip(),
        request,
        metric,
        answer,
        tuple(options),
        category=str(record.get("category", "all")),
        groups=tuple(record.get("groups") or ()),
        evidence=Request.from_record({"prompt": "", "videos": record.get("evidence")}, where).videos,
    )


def _answer(answer: Any, metric: str, options: list[str]) -> Any:
    if answer is None or answer == "" or answer == []:
        raise ValueError("there is no answer to compare with")
    if metric in _CHOICES:
        return _letter(answer, options)
    if metric == "mathvista":
        return _wanted(answer, options)
    if metric == "grounding":
        return _interval(answer)
    if metric == "intervals":
        if not isinstance(answer, list):
            raise ValueError(f"the answer must be a list of [start, end] in seconds, not {answer!r}")
        return [_interval(part) for part in answer]
    if metric == "number":
        if not (isinstance(answer, list) and len(answer) == 2 and all(map(_is_number, answer))):
            raise ValueError(f"the answer must be [number, decimal places], not {answer!r}")
        return (float(answer[0]), int(answer[1]))
    if metric == "yes_no":
        if str(answer).lower() not in ("yes", "no"):
            raise ValueError(f"the answer must be yes or no, not {answer!r}")
        return str(answer).lower()
    if metric == "relaxed":
        return str(answer)
    return [str(item) for item in answer] if isinstance(answer, list) else [str(answer)]


def _letter(answer: Any, options: list[str]) -> str:
    letters = metrics.LETTERS[: len(options)]
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
        return answer.upper()
    if answer in options:
        return letters[options.index(answer)]
    raise ValueError(f"the answer {answer!r} is neither a letter up to {letters[-1]} nor an option")


def _wanted(answer: Any, options: list[str]) -> mathvista.Wanted:
    given = answer if isinstance(answer, Mapping) else {}
    value, kind, places = given.get("value"), given.get("kind"), given.get("precision", 0)
    if not isinstance(value, str) or kind not in mathvista.ANSWER_KINDS or not isinstance(places, int):
        kinds = ", ".join(mathvista.ANSWER_KINDS)
        form = f'{{"value": text, "kind": one of {kinds}, "precision"?: decimal places}}'
        raise ValueError(f"the answer must be {form}, not {answer!r}")
    wanted = mathvista.Wanted(value, kind, places)
    fits = value in options if kind == "text" else mathvista.normalised(value, wanted, ()) == value
    if (kind == "text") != bool(options) or not fits:
        form = "one of the options" if options or kind == "text" else f"written as {kind}"
        raise ValueError(f"the answer {value!r} is not {form}")
    return wanted


def _interval(value: Any) -> tuple[float, float]:
    if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))):
        raise ValueError(f"the answer must be [start, end] in seconds, not {value!r}")
    if not 0 <= value[0] < value[1]:
        raise ValueError(f"the answer must be [start, end] in seconds, not {value!r}")
    return (float(value[0]), float(value[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _placed(record: Any, base: Path) -> Any:
    """The record with its media's paths relative to `base`."""
    if not isinstance(record, dict):
        return record
    media = {
        key: record[key] for key in ("images", "videos", "evidence") if isinstance(record.get(key), list)
    }
    return record | {key: [_place(item, base) for item in items] for key, items in media.items()}


def _place(item: Any, base: Path) -> Any:
    if isinstance(item, str):
        return os.path.normpath(base / item)
    if isinstance(item, dict) and isinstance(item.get("video"), str):
        return {**item, "video": os.path.normpath(base / item["video"])}
    return item

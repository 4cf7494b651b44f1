"""Benchmark questions in one JSONL form, and how an answer to each is scored.

A line: `{"id", "question", "answer", "metric", "images"?, "videos"?, "options"?, "category"?, "max_tiles"?}`.
Metrics: `choice` (answer: a letter or an option), `anls` and `exact` (a text or a list of accepted ones),
`relaxed` (a text or number), `grounding` (answer: [start, end] in seconds).  Paths are relative to the file.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.data.ledger import LedgerEntry
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation import metrics
from megatron_eagle.inference.generate import Request

_INSTRUCTION = {
    "choice": "Answer with the option's letter from the given choices directly.",
    "anls": "Answer the question using a single word or phrase.",
    "exact": "Answer the question using a single word or phrase.",
    "relaxed": "Answer the question using a single word or phrase.",
    "grounding": "Answer with the start and the end in seconds, as in: 12.0 to 18.5 seconds.",
}


@dataclass(frozen=True)
class Question:
    """One question: what is asked, and what its answer is compared with."""

    id: str
    request: Request
    metric: str
    answer: Any
    options: tuple[str, ...] = ()
    category: str = "all"

    def score(self, text: str) -> float:
        """The score of an answer in [0, 1]; for `grounding` its temporal IoU."""
        if self.metric == "choice":
            return metrics.choice_accuracy(text, self.options, self.answer)
        if self.metric == "grounding":
            return metrics.temporal_iou(metrics.parse_interval(text), self.answer)
        if self.metric == "relaxed":
            return metrics.relaxed_accuracy(text, self.answer)
        return {"anls": metrics.anls, "exact": metrics.exact_match}[self.metric](text, self.answer)


def read_benchmark(path: Path) -> tuple[list[Question], list[LedgerEntry]]:
    """Questions of a file, and a ledger entry for every line that is none (a missing answer, for one).

    Raises `UserError` if the file cannot be read or holds no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this benchmark: {str(error).splitlines()[0]}") from None
    questions: dict[str, Question] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            question = _question(json.loads(line), path, number)
            if question.id in questions:
                raise ValueError(f"the id {question.id!r} appears twice")
            questions[question.id] = question
        except (ValueError, UserError) as error:
            problems.append(LedgerEntry(str(path), number, str(error), "bad question"))
    if not questions:
        raise UserError(
            f"{path}: holds no question; the first problem: {problems[0].reason if problems else 'no lines'}"
        )
    return list(questions.values()), problems


def _question(record: Any, path: Path, number: int) -> Question:
    if not isinstance(record, Mapping) or not isinstance(record.get("question"), str):
        raise ValueError('a question needs "question" (text)')
    metric = record.get("metric")
    if metric not in _INSTRUCTION:
        raise ValueError(f"metric {metric!r} is none of {', '.join(_INSTRUCTION)}")
    options = record.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError('"options" must be a list of texts')
    if not 2 <= len(options) <= len(metrics.LETTERS) and metric == "choice":
        raise ValueError(f"{len(options)} options; a choice has 2 to {len(metrics.LETTERS)}")
    answer = _answer(record.get("answer"), metric, options)
    prompt = [record["question"].strip()]
    if metric == "choice":
        prompt += [f"{letter}. {o}" for letter, o in zip(metrics.LETTERS, options, strict=False)]
    prompt.append(_INSTRUCTION[metric])
    base = path.resolve().parent
    media = {key: [_place(item, base) for item in record.get(key) or []] for key in ("images", "videos")}
    asked = {"prompt": "\n".join(prompt), **media, "max_tiles": record.get("max_tiles")}
    request = Request.from_record(asked, f"{path}, line {number}")
    category = str(record.get("category", "all"))
    return Question(str(record.get("id", number)), request, metric, answer, tuple(options), category)


def _answer(answer: Any, metric: str, options: list[str]) -> Any:
    if answer is None or answer == "" or answer == []:
        raise ValueError("there is no answer to compare with")
    if metric == "choice":
        letters = metrics.LETTERS[: len(options)]
        if isinstance(answer, str) and len(answer) == 1 and answer.upper() in letters:
            return answer.upper()
        if answer in options:
            return letters[options.index(answer)]
        raise ValueError(f"the answer {answer!r} is neither a letter up to {letters[-1]} nor an option")
    if metric == "grounding":
        numbers = isinstance(answer, list) and len(answer) == 2
        numbers = numbers and all(isinstance(n, int | float) and not isinstance(n, bool) for n in answer)
        if not numbers or not 0 <= answer[0] < answer[1]:
            raise ValueError(f"the answer must be [start, end] in seconds, not {answer!r}")
        return (float(answer[0]), float(answer[1]))
    if metric == "relaxed":
        return str(answer)
    return [str(item) for item in answer] if isinstance(answer, list) else [str(answer)]


def _place(item: Any, base: Path) -> Any:
    if isinstance(item, str):
        return os.path.normpath(base / item)
    if isinstance(item, dict) and isinstance(item.get("video"), str):
        return {**item, "video": os.path.normpath(base / item["video"])}
    return item

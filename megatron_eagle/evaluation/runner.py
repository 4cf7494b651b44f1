"""Evaluation of a model on a benchmark: every answer is kept at once, a run that was stopped goes on.

`answers.jsonl` begins with a line that says what was evaluated and how; another evaluation is refused there.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question
from megatron_eagle.evaluation.judge import SCALES, Judge, UnusableJudge
from megatron_eagle.evaluation.metrics import recall_at
from megatron_eagle.files import AppendedFile, to_line, write_whole
from megatron_eagle.inference.generate import Answers, Request, Sampling
from megatron_eagle.inference.resume import resume
from megatron_eagle.problems import LedgerEntry, write_ledger

RECALLS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class ScoreRow:
    """One line of the table: a category (or all) under one metric, its mean score, R@1 for grounding."""

    category: str
    metric: str
    n: int
    score: float
    recalls: tuple[float, ...] = ()


def run_benchmark(
    model: Callable[[], Answers],
    questions: Sequence[Question],
    problems: list[LedgerEntry],
    folder: Path,
    sampling: Sampling,
    about: dict[str, Any],
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    judge: Judge | None = None,
    local: Callable[[Request], Request] = lambda request: request,
) -> list[tuple[Question, float]]:
    """Answer and score what `folder` does not have yet.

    Questions that cannot be asked go to `dropped.jsonl` and count in no score.

    Args:
        model: only called if there is something to ask.
        problems: the questions that cannot be asked.
        about: names model and benchmark.
        local: makes files of media that lie elsewhere.

    Returns:
        Each question that has an answer and whose right answer is known here, and its score.

    Raises:
        UserError: the folder holds another evaluation, or questions need a `judge` and there is none.
        OSError: an answer cannot be written; those before it are kept.
    """
    if judge is None and (judged := [q.id for q in questions if q.metric in SCALES]):
        raise UserError(f"{len(judged):,} answers are compared by a language model: name one with --judge")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "answers.jsonl"
    head = {**about, "sampling": asdict(sampling)}
    try:
        answers = {record["id"]: _known(record["score"]) for record in resume(path, head)}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; delete it or give another --output") from None
    todo = [question for question in questions if question.id not in answers]
    refused = list(problems)
    if todo:
        ready = model()
        with AppendedFile(path) as file:
            for question in progress(todo):
                try:
                    text = ready.answer(local(question.request), sampling)
                    evidence = (
                        local(Request("", videos=question.evidence)).videos if question.evidence else ()
                    )
                    seen = replace(question, evidence=evidence)
                    score = seen.score(text, judge) if question.scored else None
                except UnusableJudge:
                    raise
                except UserError as error:
                    refused.append(LedgerEntry(str(about.get("benchmark", "")), 0, str(error), "not asked"))
                    continue
                answers[question.id] = score
                record = {"id": question.id, "answer": text, "score": score}
                reading = question.reading(text, judge)
                file.write(to_line(record | ({"read": reading} if reading else {})))
    write_ledger(folder / "dropped.jsonl", refused)
    scores = [(question, answers.get(question.id)) for question in questions]
    return [(question, score) for question, score in scores if score is not None]


def _known(score: float | None) -> float | None:
    return None if score is None else float(score)


def count_readings(folder: Path) -> dict[str, int]:
    """How many answers were read off as they are, by rule and by the judge; nothing where none were."""
    with (folder / "answers.jsonl").open(encoding="utf-8") as lines:
        next(lines)  # says what was evaluated
        return dict(Counter(record["read"] for record in map(json.loads, lines) if "read" in record))


def render_readings(readings: dict[str, int]) -> str:
    """`count_readings` as text, with a line end; empty where nothing was read off."""
    if not readings:
        return ""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(readings.items()))
    ours = (
        "; the rule is ours, the authors have a language model read (--judge)"
        if "by rule" in readings
        else ""
    )
    return f"answers read off: {counts}{ours}\n"


def write_scores(folder: Path, head: dict[str, Any], rows: Sequence[ScoreRow], overall: float | None) -> None:
    """`scores.json`: the table, and the one number of a published benchmark."""
    asked = {row.metric: row.n for row in rows}  # the last row of a metric is that over all categories
    _write(folder, {**head, "asked": asked, "overall": overall, "rows": list(map(asdict, rows))})


def write_unscored(folder: Path, head: dict[str, Any], asked: int) -> None:
    """`scores.json` of as many answers that are scored elsewhere."""
    _write(folder, {**head, "asked": {"submission": asked}, "overall": None, "rows": []})


def _write(folder: Path, scores: dict[str, Any]) -> None:
    write_whole(folder / "scores.json", json.dumps(scores, indent=1))


def tabulate(scored: Sequence[tuple[Question, float]]) -> list[ScoreRow]:
    """Means by category and, where there are several categories, over all, for each metric."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for question, score in scored:
        groups[question.metric, question.category].append(score)
    rows = []
    for metric in sorted({metric for metric, _ in groups}):
        of_metric = {category: scores for (m, category), scores in groups.items() if m == metric}
        if len(of_metric) > 1:
            of_metric["(all)"] = [score for scores in of_metric.values() for score in scores]
        for category, scores in of_metric.items():
            iou = metric in ("grounding", "intervals")
            recalls = tuple(recall_at(scores, at) for at in RECALLS) if iou else ()
            rows.append(ScoreRow(category, metric, len(scores), sum(scores) / len(scores), recalls))
    return rows


def render_scores(rows: Sequence[ScoreRow]) -> str:
    """The table as text, scores in percent."""
    width = max([len(row.category) for row in rows] + [8])
    lines = [f"{'category':<{width}}  {'metric':<10} {'n':>6} {'score':>7}"]
    for row in rows:
        line = f"{row.category:<{width}}  {row.metric:<10} {row.n:>6,} {100 * row.score:>7.2f}"
        marks = zip(RECALLS, row.recalls, strict=False)
        lines.append(line + "".join(f"  R@{at:g} {100 * value:.2f}" for at, value in marks))
    return "\n".join(lines)

"""Evaluation of a model on a benchmark: every answer is kept at once, a run that was stopped goes on.

`answers.jsonl` begins with a line that says what was evaluated and how; another evaluation is refused there.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_eagle.data.ledger import LedgerEntry, write_ledger
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question
from megatron_eagle.evaluation.metrics import recall_at
from megatron_eagle.inference.generate import Request, Sampling

RECALLS = (0.3, 0.5, 0.7)


class Answers(Protocol):
    """What is evaluated: `inference.generate.ExportedModel`, or anything that answers."""

    def answer(self, request: Request, sampling: Sampling) -> str:
        """The answer to one request.  Raises `UserError` for media that are missing or unreadable."""
        ...


@dataclass(frozen=True)
class Row:
    """One line of the table: a category (or all) under one metric, its mean score, R@1 for grounding."""

    category: str
    metric: str
    n: int
    score: float
    recalls: tuple[float, ...] = ()


def evaluate(
    model: Callable[[], Answers],
    questions: Sequence[Question],
    problems: list[LedgerEntry],
    folder: Path,
    sampling: Sampling,
    about: dict[str, Any],
    progress: Callable[[list], Iterator] = iter,
) -> list[Row]:
    """Answer and score what `folder` does not have yet; returns the table and writes `scores.json`.

    `about` names model and benchmark; `model` is only made if there is something to ask.  Questions that
    cannot be asked go to `dropped.jsonl` with `problems` and count in no score.  Raises `UserError` if the
    folder holds another evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "answers.jsonl"
    head = {**about, "sampling": asdict(sampling)}
    answers = _resume(path, head)
    todo = [question for question in questions if question.id not in answers]
    refused = list(problems)
    if todo:
        ready = model()
        with path.open("a", encoding="utf-8") as file:
            for question in progress(todo):
                try:
                    text = ready.answer(question.request, sampling)
                except UserError as error:
                    refused.append(LedgerEntry(str(about.get("benchmark", "")), 0, str(error), "not asked"))
                    continue
                answers[question.id] = text
                record = {"id": question.id, "answer": text, "score": question.score(text)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
    write_ledger(folder / "dropped.jsonl", refused)
    rows = tabulate([(q, q.score(answers[q.id])) for q in questions if q.id in answers])
    (folder / "scores.json").write_text(json.dumps({**head, "rows": list(map(asdict, rows))}, indent=1))
    return rows


def tabulate(scored: Sequence[tuple[Question, float]]) -> list[Row]:
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
            recalls = tuple(recall_at(scores, at) for at in RECALLS) if metric == "grounding" else ()
            rows.append(Row(category, metric, len(scores), sum(scores) / len(scores), recalls))
    return rows


def render(rows: Sequence[Row]) -> str:
    """The table as text, scores in percent."""
    width = max([len(row.category) for row in rows] + [8])
    lines = [f"{'category':<{width}}  {'metric':<10} {'n':>6} {'score':>7}"]
    for row in rows:
        line = f"{row.category:<{width}}  {row.metric:<10} {row.n:>6,} {100 * row.score:>7.2f}"
        marks = zip(RECALLS, row.recalls, strict=False)
        lines.append(line + "".join(f"  R@{at:g} {100 * value:.2f}" for at, value in marks))
    return "\n".join(lines)


def _resume(path: Path, head: dict[str, Any]) -> dict[str, str]:
    """Answers that are there; the file afterwards ends with a whole line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):  # the run was killed while it wrote
        lines.pop()
    try:
        records = [json.loads(line) for line in lines]
        if records and records[0] != json.loads(json.dumps(head)):
            raise UserError(f"{path}: holds another evaluation ({records[0]}); give another --output")
        found = {record["id"]: record["answer"] for record in records[1:]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; delete it or give another --output") from None
    path.write_bytes(b"".join(lines) or (json.dumps(head, ensure_ascii=False) + "\n").encode())
    return found

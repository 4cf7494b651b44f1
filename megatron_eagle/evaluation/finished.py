"""What a finished evaluation has left in its folder: scores, answers, what was dropped."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question, read_benchmark
from megatron_eagle.evaluation.provenance import ASKED
from megatron_eagle.evaluation.published.registry import BENCHMARKS
from megatron_eagle.evaluation.published.source import Source
from megatron_eagle.evaluation.summary import Result, result_of
from megatron_eagle.files import split_lines
from megatron_eagle.inference.generate import Sampling


@dataclass(frozen=True)
class Finished:
    """One folder of results.

    Attributes:
        scores: of `scores.json`.
        sampling: how media were shown, and how long answers could be.
        answers: of `answers.jsonl`: id, answer, score.
        dropped: of `dropped.jsonl`: kind and reason of what is in no score.
        asked: of `asked.jsonl`: date, versions and certificate of each start.
    """

    folder: Path
    scores: dict[str, Any]
    sampling: Sampling
    answers: Sequence[dict[str, Any]]
    dropped: Sequence[dict[str, Any]]
    asked: Sequence[dict[str, Any]]

    @property
    def name(self) -> str:
        """The benchmark."""
        return self.scores.get("published") or Path(self.scores["benchmark"]).stem

    @property
    def result(self) -> Result | None:
        """Beside the published score; None for questions of one's own."""
        return result_of(self.scores) if "published" in self.scores else None

    @property
    def dropped_kinds(self) -> list[tuple[str, int, str]]:
        """Kind, number and first reason of what is in no score, the most frequent first."""
        counts = Counter(entry["kind"] for entry in self.dropped).most_common()
        first = {entry["kind"]: entry["reason"] for entry in reversed(self.dropped)}
        return [(kind, n, first[kind]) for kind, n in counts]

    def questions(self) -> dict[str, Question]:
        """By id; read again from where the evaluation had them.

        Raises:
            UserError: they cannot be read any more.
        """
        if "published" in self.scores:
            shown = (self.sampling.fps or 2.0, self.sampling.max_frames)
            # `evaluate frames` keeps the pictures of all its runs in one place.
            output = self.folder.parent if self.folder.name.startswith("frames-") else self.folder
            source = Source(self.scores["data"], output / "pictures", *shown)
            found = BENCHMARKS[self.scores["published"]].questions(source)[0]
        else:
            found = read_benchmark(Path(self.scores["benchmark"]))[0]
        return {question.id: question for question in found}


def read_finished(folder: Path) -> list[Finished]:
    """The evaluation in a folder, or those of `evaluate frames` in it, the fewest frames first.

    Raises:
        UserError: there is none that is finished.
    """
    folders = [path.parent for path in folder.glob("frames-*/scores.json")]
    found = [_read(path) for path in folders or [folder]]
    return sorted(found, key=lambda finished: finished.sampling.max_frames or 0)


def _read(folder: Path) -> Finished:
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        head, *answers = _lines(folder / "answers.jsonl")
        sampling = Sampling(**head["sampling"])
        asked = _lines(folder / ASKED) if (folder / ASKED).exists() else []
        finished = Finished(folder, scores, sampling, answers, _lines(folder / "dropped.jsonl"), asked)
        known = "benchmark" in scores or ("published" in scores and bool(result_of(scores)))
        whole = all({"id", "answer", "score"} <= answer.keys() for answer in answers)
        if known and whole and {"rows", "asked", "model"} <= scores.keys():
            return finished
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    raise UserError(f"{folder}: no finished evaluation (`megatron-eagle evaluate run`)")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))]


def worst(
    answers: Sequence[dict[str, Any]], questions: dict[str, Question], n: int
) -> list[tuple[Question, dict[str, Any]]]:
    """At most n answers with the lowest scores; where scores are equal one of each category in turn."""
    chosen: list[tuple[Question, dict[str, Any]]] = []
    known = [(questions[answer["id"]], answer) for answer in answers if answer["id"] in questions]
    for score in sorted({answer["score"] for _, answer in known}):
        equal = [pair for pair in known if pair[1]["score"] == score]
        by_category = [
            [pair for pair in equal if pair[0].category == category]
            for category in dict.fromkeys(question.category for question, _ in equal)
        ]
        chosen += [pair for turn in zip_longest(*by_category) for pair in turn if pair is not None]
        if len(chosen) >= n:
            break
    return chosen[:n]

"""One number for a benchmark, beside the published one; and how it grows with the frames."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question
from megatron_eagle.evaluation.published.facts import FACTS, Facts, Split
from megatron_eagle.evaluation.published.registry import BENCHMARKS, Published

Scored = Sequence[tuple[Question, float]]


def overall(published: Published, scored: Scored, read: Sequence[Question]) -> float | None:
    """The score of a benchmark, in parts of its scale; None where it counts groups and none is whole.

    Args:
        read: all questions of the benchmark, also those that were not asked.

    Raises:
        ZeroDivisionError: nothing was answered.
    """
    mean = _mean([score for _, score in scored])
    if published.score == "categories":
        mean = _mean([_mean(scores) for scores in _by([(q.category, s) for q, s in scored]).values()])
    elif published.score != "mean":
        kinds = sorted({group.split(" ")[0] for question in read for group in question.groups})
        shares = [_whole(scored, read, kind) for kind in kinds]
        parts = shares if published.score == "groups" else [mean, *shares]
        if any(part is None for part in parts):
            return None
        mean = _mean([part for part in parts if part is not None])
    return published.scale * mean


def _whole(scored: Scored, read: Sequence[Question], kind: str) -> float | None:
    """The share of groups of this kind in which every answer is right, among those that were asked whole."""
    pairs = [(group, score) for question, score in scored for group in question.groups]
    groups = _by([(group, score) for group, score in pairs if group.startswith(f"{kind} ")])
    sizes = Counter(group for question in read for group in question.groups)
    asked = [scores for group, scores in groups.items() if len(scores) == sizes[group]]
    return _mean([float(min(scores) == 1) for scores in asked]) if asked else None


def _by(pairs: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, score in pairs:
        groups[name].append(score)
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Result:
    """What `scores.json` of an evaluation says of a published benchmark.

    Attributes:
        score: None where the benchmark counts groups of questions and none was asked whole, and where its
            answers are not known here.
        asked: questions that have an answer.
        limited: questions were left out with `--limit`.
    """

    benchmark: str
    score: float | None
    asked: int
    frames: int | None
    limited: bool = False

    @property
    def facts(self) -> Facts:
        """Of the benchmark."""
        return FACTS[self.benchmark]

    @property
    def split(self) -> Split:
        """The split that was asked, or that most likely should have been."""
        return self.facts.split(self.asked)

    @property
    def doubt(self) -> str:
        """Why the score must not be compared with the published one; empty if it may be."""
        facts, split = self.facts, self.split
        named = f"{self.asked:,} of {split.questions:,} questions ({split.name})"
        if self.limited:
            return f"{named}, by --limit"
        if self.asked != split.questions:
            missing = split.questions - self.asked
            return f"{named}: {missing:,} are missing" if missing > 0 else f"{named}: {-missing:,} too many"
        if facts.reference not in (None, split.name):
            return f"{named}; the published score is that of {facts.reference}"
        return ""

    @property
    def note(self) -> str:
        """`doubt`, else that several splits might be meant; empty if there is nothing to say."""
        if self.doubt:
            return f"{self.doubt}; no difference is given"
        if BENCHMARKS[self.benchmark].reference is None:
            return f"{self.split.name} was asked; Eagle 2.5 8B has no published score"
        if self.facts.reference is None and len(self.facts.splits) > 1:
            names = " or ".join(f"{split.name} ({split.questions:,})" for split in self.facts.splits)
            return f"{self.split.name} was asked; of {names}, the published score does not say which"
        return ""


def read_result(folder: Path) -> Result:
    """What an evaluation of a published benchmark has written.

    Raises:
        UserError: the folder holds none that is finished.
    """
    try:
        return result_of(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder}: no scores of a published benchmark (`megatron-eagle evaluate run --published`)"
        ) from None


def result_of(scores: Mapping[str, Any]) -> Result:
    """What `scores.json` of a published benchmark says.

    Raises:
        KeyError, TypeError, AttributeError: it is not as `write_scores` writes it.
    """
    name, asked = scores["published"], sum(scores["asked"].values())
    limit, frames = scores["limit"], scores["sampling"]["max_frames"]
    # Of a result that does not say how many could be asked, a limit may have left out any.
    limited = limit is not None and asked < scores.get("found", asked + 1)
    FACTS[name]
    return Result(name, scores["overall"], asked, frames, limited)


def comparison_rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of a table, its head first: ours beside Eagle 2.5 8B as published.

    A difference is one of the same questions; what `--limit` left of them stands beside no published score.
    """
    rows = [["benchmark", "asked", "of", "ours", "published", "difference"]]
    for result in results:
        reference = BENCHMARKS[result.benchmark].reference
        ours = "-" if result.score is None else f"{result.score:.2f}"
        published, difference = "-", "-"
        if reference is not None and not result.limited:
            published = f"{reference:.2f}"
            if result.score is not None and not result.doubt:
                difference = f"{result.score - reference:+.2f}"
        expected = f"{result.split.questions:,}"
        rows.append([result.benchmark, f"{result.asked:,}", expected, ours, published, difference])
    return rows


def remarks(results: Sequence[Result]) -> list[str]:
    """What has to be said of each result's place beside the published one."""
    return list(dict.fromkeys(f"{result.benchmark}: {result.note}" for result in results if result.note))


def comparison(results: Sequence[Result]) -> str:
    """The same as text, with its notes."""
    rows = comparison_rows(results)
    widths = [max(7, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    ]
    return "\n".join([*lines, *remarks(results)])


def plot_frames(results: Sequence[Result], png: Path | BinaryIO) -> None:
    """Score over the most frames that a video may have, one line for each benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(result.benchmark for result in results):
        points = sorted((r.frames, r.score) for r in results if r.benchmark == name and r.score is not None)
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    ticks = sorted({result.frames for result in results if result.frames is not None})
    axis.set(xscale="log", xlabel="frames at most", ylabel="score", title="Score and number of frames")
    axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(png, format="png", dpi=120)
    pyplot.close(figure)

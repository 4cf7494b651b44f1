"""One number for a benchmark, beside the published one; and how it grows with the frames."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.benchmarks import Question
from megatron_eagle.evaluation.published.registry import BENCHMARKS, Published

Scored = Sequence[tuple[Question, float]]


def overall(published: Published, scored: Scored) -> float:
    """The score of a benchmark, in parts of its scale.

    Raises:
        ZeroDivisionError: nothing was answered.
    """
    mean = _mean([score for _, score in scored])
    if published.score == "categories":
        mean = _mean([_mean(scores) for scores in _by([(q.category, s) for q, s in scored]).values()])
    elif published.score == "groups":
        mean = _whole(scored, "question")
    elif published.score == "hallusion":
        figures = [(q, s) for q, s in scored if q.request.images]
        parts = [mean, _whole(scored, "question")]
        mean = _mean([*parts, _whole(figures, "figure")] if figures else parts)
    return published.scale * mean


def _whole(scored: Scored, kind: str) -> float:
    """The share of groups of this kind in which every answer is right."""
    pairs = [(group, score) for question, score in scored for group in question.groups]
    groups = _by([(group, score) for group, score in pairs if group.startswith(f"{kind} ")])
    return _mean([float(min(scores) == 1) for scores in groups.values()])


def _by(pairs: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, score in pairs:
        groups[name].append(score)
    return groups


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Result:
    """What `scores.json` of an evaluation says of a published benchmark."""

    benchmark: str
    score: float
    asked: int
    frames: int | None


def read_result(folder: Path) -> Result:
    """What an evaluation of a published benchmark has written.

    Raises:
        UserError: the folder holds none that is finished.
    """
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        frames = scores["sampling"]["max_frames"]
        return Result(scores["published"], scores["overall"], sum(scores["asked"].values()), frames)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: no scores of a published benchmark (`megatron-eagle evaluate run --published`)"
        ) from None


def comparison_rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of a table, its head first: ours beside Eagle 2.5 8B as published."""
    rows = [["benchmark", "asked", "ours", "published", "difference"]]
    for result in results:
        reference = BENCHMARKS[result.benchmark].reference
        numbers = [f"{result.score:.2f}", f"{reference:.2f}", f"{result.score - reference:+.2f}"]
        rows.append([result.benchmark, f"{result.asked:,}", *numbers])
    return rows


def comparison(results: Sequence[Result]) -> str:
    """The same as text."""
    rows = comparison_rows(results)
    widths = [max(7, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}" + "".join(f"  {cell:>{n}}" for cell, n in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    ]
    return "\n".join(lines)


def plot_frames(results: Sequence[Result], png: Path | BinaryIO) -> None:
    """Score over the most frames that a video may have, one line for each benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(result.benchmark for result in results):
        points = sorted((r.frames, r.score) for r in results if r.benchmark == name)
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

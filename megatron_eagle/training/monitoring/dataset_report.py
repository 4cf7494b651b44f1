"""The part of a run's report that is by data set: loss curves, the mix, and a table of all data sets."""

import html
import statistics
from collections.abc import Sequence

from megatron_eagle.training.monitoring.charts import Points, figure, line_chart, share_chart
from megatron_eagle.training.monitoring.metrics import EvaluationMetrics, StepMetrics

_DRAWN = 8  # data sets with a curve of their own: those with most weight in the loss
_LAST = 20  # steps of a data set whose mean loss the table shows


def dataset_figures(steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics]) -> list[str]:
    """Curves of the losses, and the mix over the steps; none for a run that did not record them."""
    shares = _by_dataset(steps, "share_by_dataset")
    figures = [
        _loss_figure("Loss by data set", _by_dataset(steps, "loss_by_dataset"), shares),
        _loss_figure(
            "Evaluation loss by data set",
            _by_dataset(evaluations, "evaluation_loss_by_dataset"),
            _by_dataset(evaluations, "evaluation_share_by_dataset"),
        ),
    ]
    mixed = [step for step in steps if step.share_by_dataset]
    if mixed:
        drawn = _heaviest(shares)[:_DRAWN]
        parts = {name: [step.share_by_dataset.get(name) or 0.0 for step in mixed] for name in drawn}
        if len(drawn) < len(shares):
            parts["others"] = [max(0.0, 1 - sum(column)) for column in zip(*parts.values(), strict=True)]
        chart = share_chart([step.iteration for step in mixed], parts)
        figures.append(figure("Mix: weight in the loss, %", "By data set.", chart))
    return [drawn for drawn in figures if drawn]


def dataset_table(steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics]) -> str:
    """A line for each data set that was trained on or held out; a dash where it was absent."""
    shares, losses = _by_dataset(steps, "share_by_dataset"), _by_dataset(steps, "loss_by_dataset")
    tokens = _by_dataset(steps, "tokens_by_dataset")
    held_out = _by_dataset(evaluations, "evaluation_share_by_dataset")
    asked = _by_dataset(evaluations, "evaluation_loss_by_dataset")
    names = list(dict.fromkeys(_heaviest(shares) + _heaviest(held_out)))
    mixed = sum(bool(step.share_by_dataset) for step in steps)
    if not names:
        return ""
    head = ("tokens", "weight, %", f"loss, its last {_LAST} steps", "evaluation loss, last")
    rows = "".join(f'<th class="number">{title}</th>' for title in head)
    for name in names:
        cells = ["-"] * 4
        if shares.get(name):
            cells[0] = f"{sum(_values(tokens[name])):,}"
            cells[1] = f"{100 * sum(_values(shares[name])) / mixed:.2f}"
            cells[2] = f"{statistics.fmean(_values(losses[name])[-_LAST:]):.4f}"
        if asked.get(name):
            cells[3] = f"{_values(asked[name])[-1]:.4f}"
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows += f"</tr><tr><td>{html.escape(name)}</td>{numbers}"
    return f"<h3>All data sets ({len(names)})</h3><table><tr><th>data set</th>{rows}</tr></table>"


def _loss_figure(title: str, losses: dict[str, Points], shares: dict[str, Points]) -> str:
    drawn = {name: losses[name] for name in _heaviest(shares)[:_DRAWN]}
    if not any(drawn.values()):
        return ""
    note = f"The {_DRAWN} with most weight, of {len(losses)}." if len(losses) > _DRAWN else ""
    return figure(title, note, line_chart(drawn, from_zero=False))


def _by_dataset(records: Sequence[StepMetrics | EvaluationMetrics], field: str) -> dict[str, Points]:
    """A number of each data set over the iterations in which it was there."""
    found: dict[str, Points] = {}
    for record in records:
        for name, value in getattr(record, field).items():
            points = found.setdefault(name, [])
            if value is not None:
                points.append((record.iteration, value))
    return found


def _heaviest(shares: dict[str, Points]) -> list[str]:
    """The names, those with most weight over all iterations first."""
    return sorted(shares, key=lambda name: -sum(_values(shares[name])))


def _values(points: Points) -> list[float]:
    return [y for _, y in points]

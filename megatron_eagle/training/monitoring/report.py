"""A run in one HTML file: curves and events out of its logs, self-contained, nothing loaded from anywhere."""

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.training.monitoring.charts import Points, figure, line_chart, share_chart
from megatron_eagle.training.monitoring.dataset_report import dataset_figures, dataset_table
from megatron_eagle.training.monitoring.metrics import (
    EVENTS_FILE,
    METRICS_FILE,
    EvaluationMetrics,
    StepMetrics,
    find_logs,
    read_events,
    read_metrics,
)

_EVENTS = 200  # the latest are listed
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1.5em;
       color: #222; background: #fafafa }
h1 { font-size: 1.5em; margin: 0 0 .2em } h2 { font-size: 1em; margin: 0 0 .2em; font-weight: 600 }
h3 { font-size: 1.1em; margin: 1.8em 0 .6em; border-bottom: 1px solid #ddd; padding-bottom: .2em }
p.note { color: #666; margin: 0 0 .4em; font-size: .92em }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: .6em;
         margin-top: 1em }
.facts div, figure { background: #fff; border: 1px solid #e2e2e2; border-radius: 6px; padding: .6em .9em }
.facts b { display: block; font-size: 1.25em; font-weight: 600 } .facts span { color: #666 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 1em }
figure { margin: 0 } svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: #555 }
.legend { margin: .2em 0 0; font-size: .85em; color: #555 }
.legend span { display: inline-block; margin-right: 1.2em }
.legend b { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
td.number, th.number { text-align: right }
table { border-collapse: collapse; background: #fff }
td, th { padding: .25em 1.2em .25em .5em; text-align: left; border-bottom: 1px solid #eee }
pre { background: #fff; border: 1px solid #e2e2e2; padding: 1em; overflow: auto }
"""


def write_run_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Draw the run whose checkpoints (or logs) lie in `run`; returns the file, `report.html` in its logs
    unless `output` names another.

    Raises:
        UserError: there is no finished step to draw, or the file cannot be written.
    """
    run = Path(run)
    logs = find_logs(run)
    metrics = [] if logs is None else read_metrics(logs / METRICS_FILE)
    if logs is None or not any(isinstance(record, StepMetrics) for record in metrics):
        raise UserError(
            f"{run}: no finished step to report; expected a run's folder with logs/{METRICS_FILE}"
        )
    page = render_report(run.resolve().name, metrics, read_events(logs / EVENTS_FILE), _settings(run))
    output = logs / "report.html" if output is None else Path(output)
    try:
        write_whole(output, page)
    except OSError as error:
        raise UserError(f"{output}: cannot write the report: {error.strerror}") from error
    return output


def render_report(
    name: str,
    metrics: Sequence[StepMetrics | EvaluationMetrics],
    events: Sequence[dict[str, Any]],
    settings: str | None,
) -> str:
    """The page. Everything that came from a user is escaped."""
    steps = [record for record in metrics if isinstance(record, StepMetrics)]
    evaluations = [record for record in metrics if isinstance(record, EvaluationMetrics)]
    evaluated = _points(metrics, "evaluation_loss")
    title = html.escape(f"Training run {name}")
    facts = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(key)}</span></div>"
        for key, value in _facts(steps, evaluated).items()
    )
    sections = {
        "Learning": _learning(steps, evaluated, events),
        "Data sets": dataset_figures(steps, evaluations),
        "Speed": _speed(steps),
        "Data": _data(steps),
        "Memory": _memory(steps),
    }
    drawn = "".join(
        f'<h3>{heading}</h3><div class="charts">{"".join(figures)}</div>'
        for heading, figures in sections.items()
        if figures
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        '<p class="note">Curves over iterations; long runs are drawn as means of neighbouring steps.</p>'
        f'<div class="facts">{facts}</div>{drawn}{dataset_table(steps, evaluations)}'
        f"{_event_table(events)}{_settings_block(settings)}</body></html>\n"
    )


def _facts(steps: Sequence[StepMetrics], evaluated: Points) -> dict[str, str]:
    last = steps[-1]
    seconds = sum(step.seconds for step in steps)
    facts = {
        "iterations": f"{last.iteration:,}",
        "loss, last": f"{last.loss:.4f}",
        "evaluation loss, last": f"{evaluated[-1][1]:.4f}" if evaluated else "none",
        "tokens, padding included": f"{sum(step.tokens for step in steps):,}",
        "time in steps": f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.1f} s",
        "tokens per second, median": f"{statistics.median(s.tokens_per_second for s in steps):,.0f}",
        "TFLOP/s of one process, median": f"{statistics.median(s.tflops for s in steps):.3g}",
        "of the time waited for data": f"{sum(s.data_seconds for s in steps) / seconds:.1%}",
    }
    mfu = [step.mfu for step in steps if step.mfu is not None]
    if mfu:
        facts["MFU, median"] = f"{statistics.median(mfu):.1%}"
    for name, wanted in (("frames", "frames_wanted"), ("tiles", "tiles_wanted")):
        asked = sum(getattr(step, wanted) or 0 for step in steps)
        if asked:
            facts[f"of the {name} wanted are kept"] = (
                f"{sum(getattr(step, name) or 0 for step in steps) / asked:.1%}"
            )
    return facts


def _learning(steps: Sequence[StepMetrics], evaluated: Points, events: Sequence[dict[str, Any]]) -> list[str]:
    marks = [(event["iteration"], f"{event['iteration']}: {event.get('event')}") for event in events]
    losses = {"training": _points(steps, "loss"), "evaluation": evaluated}
    return _figures(
        ("Loss", "Dashed: events, listed below." if events else "", losses, {"marks": marks}),
        ("Gradient norm", "Before clipping.", {"": _points(steps, "grad_norm")}, {}),
        ("Learning rate", "", {"": _points(steps, "lr")}, {}),
        (
            "Auxiliary loss of the routers",
            "Before its coefficient. As many as a token has experts: all are equally busy.",
            {"": _points(steps, "aux_loss")},
            {},
        ),
        from_zero=False,
    )


def _speed(steps: Sequence[StepMetrics]) -> list[str]:
    mfu = {
        name: _points(steps, field, 100)
        for name, field in (("all", "mfu"), ("language", "mfu_language"), ("vision", "mfu_vision"))
    }
    return _figures(
        (
            "Tokens per second",
            "All processes, padding included.",
            {"": _points(steps, "tokens_per_second")},
            {},
        ),
        ("MFU, %", "Model FLOPs, recomputation left out.", mfu, {}),
        (
            "Seconds per step",
            "Data: the wait of the rank that waited longest.",
            {"step": _points(steps, "seconds"), "data": _points(steps, "data_seconds")},
            {},
        ),
    )


def _data(steps: Sequence[StepMetrics]) -> list[str]:
    figures = []
    for whole, field in (("tokens", "tokens_by_length"), ("samples", "samples_by_length")):
        mixed = [step for step in steps if getattr(step, field)]
        if mixed:
            shares = {
                f"≤{_short(end)}": [getattr(step, field).get(end, 0.0) for step in mixed]
                for end in sorted(getattr(mixed[0], field), key=int)
            }
            chart = share_chart([step.iteration for step in mixed], shares)
            title = f"Length mix: share of {whole}, %"
            figures.append(figure(title, "By the length of samples, in tokens.", chart))
    kept: dict[str, Points] = {
        name: [
            (s.iteration, 100 * getattr(s, name) / getattr(s, wanted)) for s in steps if getattr(s, wanted)
        ]
        for name, wanted in (("frames", "frames_wanted"), ("tiles", "tiles_wanted"))
    }
    counts = {name: _points(steps, name) for name in ("frames", "tiles")} if any(kept.values()) else {}
    return figures + _figures(
        ("ADS: kept of what was wanted, %", "Tiles of pictures and pages; one tile a frame.", kept, {}),
        ("ADS: kept in a step", "", counts, {}),
        ("Packing, %", "Tokens of samples, of all tokens.", {"": _points(steps, "packing", 100)}, {}),
    )


def _memory(steps: Sequence[StepMetrics]) -> list[str]:
    note = "The process that has most."
    return _figures(
        ("Device memory, GiB", f"{note} Peak of the step.", {"": _points(steps, "device_memory_gib")}, {}),
        ("Host memory, GiB", note, {"": _points(steps, "host_memory_gib")}, {}),
    )


def _points(records: Sequence[StepMetrics | EvaluationMetrics], name: str, factor: float = 1) -> Points:
    found = [(record.iteration, getattr(record, name)) for record in records]
    return [(x, factor * y) for x, y in found if y is not None]


def _figures(
    *figures: tuple[str, str, dict[str, Points], dict[str, Any]], from_zero: bool = True
) -> list[str]:
    """A figure for each title, note, curves and further settings; none for those without a point."""
    return [
        figure(title, note, line_chart(curves, from_zero=from_zero, **more))
        for title, note, curves, more in figures
        if any(curves.values())
    ]


def _short(tokens: str) -> str:
    """512, 1K, 128K; the exact number where it is no multiple of 1024."""
    thousands, rest = divmod(int(tokens), 1024)
    return tokens if rest else f"{thousands}K"


def _settings(run: Path) -> str | None:
    """run.yaml of the newest checkpoint, if there is one."""
    files = sorted(run.glob("iter_*/run.yaml"))
    return files[-1].read_text(encoding="utf-8") if files else None


def _event_table(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return ""
    rows = ""
    for event in events[-_EVENTS:]:
        more = {k: v for k, v in event.items() if k not in ("iteration", "event", "reason", "data")}
        cells = [
            event["iteration"],
            event.get("event", ""),
            event.get("reason", ""),
            ", ".join(f"{key} {value}" for key, value in more.items()),
        ]
        rows += "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"
    head = "<tr><th>iteration</th><th>event</th><th>reason</th><th></th></tr>"
    return f"<h3>Events ({len(events)})</h3><table>{head}{rows}</table>"


def _settings_block(settings: str | None) -> str:
    if settings is None:
        return ""
    return (
        f"<h3>Settings</h3><details><summary>run.yaml</summary><pre>{html.escape(settings)}</pre></details>"
    )

"""A run in one HTML file: curves and events out of its logs, self-contained, nothing loaded from anywhere."""

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.errors import UserError
from megatron_eagle.training.metrics import EVENTS_FILE, METRICS_FILE, StepMetrics, read_events, read_metrics

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 220, 70, 26  # of a chart, pixels; margins of its axes
_POINTS = 1500  # per curve: longer runs are drawn as means of neighbouring steps
_COLORS = ("#1f6fb2", "#c2571a")
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 780px; color: #222; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.05em; margin: 1.6em 0 .3em } svg { width: 100%; height: auto }
table { border-collapse: collapse } td, th { padding: .15em .9em .15em 0; text-align: left }
pre { background: #f5f5f5; padding: 1em; overflow: auto }
text { font: 11px system-ui, sans-serif; fill: #555 }
"""
Points = list[tuple[float, float]]


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Draw the run whose checkpoints (or logs) lie in `run`; returns the file, `report.html` in its logs
    unless `output` names another.

    Raises `UserError` if there is no finished step to draw, or the file cannot be written.
    """
    run = Path(run)
    logs = next((folder for folder in (run / "logs", run) if (folder / METRICS_FILE).is_file()), None)
    steps = [] if logs is None else read_metrics(logs / METRICS_FILE)
    if not steps:
        raise UserError(
            f"{run}: no finished step to report; expected a run's folder with logs/{METRICS_FILE}"
        )
    page = render(run.resolve().name, steps, read_events(logs / EVENTS_FILE), _settings(run))
    output = logs / "report.html" if output is None else Path(output)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot write the report: {error.strerror}") from error
    return output


def render(name: str, steps: Sequence[StepMetrics], events: Sequence[dict], settings: str | None) -> str:
    """The page. Everything that came from a user is escaped."""
    last = steps[-1]
    rates = [step.tokens / step.seconds for step in steps]
    evaluated: Points = [(s.iteration, s.evaluation_loss) for s in steps if s.evaluation_loss is not None]
    rows = {
        "Iterations": f"{last.iteration} ({len(steps)} optimizer steps)",
        "Loss, last": f"{last.loss:.4f}",
        "Evaluation loss, last": f"{evaluated[-1][1]:.4f}" if evaluated else "none",
        "Tokens (padding included)": f"{sum(step.tokens for step in steps):,}",
        "Time in steps": f"{sum(step.seconds for step in steps) / 3600:.2f} h",
        "Tokens per second, median": f"{statistics.median(rates):,.0f}",
        "Model TFLOP/s of one process, median": f"{statistics.median(s.tflops for s in steps):.3g}",
    }
    mfu = [(s.iteration, 100 * s.mfu) for s in steps if s.mfu is not None]
    if mfu:
        rows["MFU, median"] = f"{statistics.median(value for _, value in mfu):.1f} %"
    charts = [
        ("Loss", {"training": _points(steps, "loss"), "evaluation": evaluated}),
        ("Learning rate", {"": _points(steps, "lr")}),
        ("Gradient norm, before clipping", {"": _points(steps, "grad_norm")}),
        (
            "Tokens per second",
            {"": [(step.iteration, rate) for step, rate in zip(steps, rates, strict=True)]},
        ),
        ("Seconds per step", {"": _points(steps, "seconds")}),
        ("MFU, %", {"": mfu}),
    ]
    table = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items()
    )
    drawn = "".join(
        f"<h2>{html.escape(title)}</h2>{_chart(curves)}" for title, curves in charts if any(curves.values())
    )
    title = html.escape(f"Training run {name}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><table>{table}</table>{drawn}"
        f"{_event_list(events)}{_settings_block(settings)}</body></html>\n"
    )


def _settings(run: Path) -> str | None:
    """run.yaml of the newest checkpoint, if there is one."""
    files = sorted(run.glob("iter_*/run.yaml"))
    return files[-1].read_text(encoding="utf-8") if files else None


def _points(steps: Sequence[StepMetrics], name: str) -> Points:
    return [(step.iteration, getattr(step, name)) for step in steps]


def _event_list(events: Sequence[dict]) -> str:
    if not events:
        return ""
    items = "".join(
        f"<li>{html.escape(json.dumps(event, ensure_ascii=False))}</li>" for event in events[-200:]
    )
    return f"<h2>Events ({len(events)})</h2><ul>{items}</ul>"


def _settings_block(settings: str | None) -> str:
    if settings is None:
        return ""
    return f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details>"


def _thin(points: Points) -> Points:
    """At most `_POINTS` points, each the mean of neighbours."""
    size = -(-len(points) // _POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups]


def _chart(curves: dict[str, Points]) -> str:
    """One SVG with all curves over the same axes."""
    curves = {name: _thin(points) for name, points in curves.items() if points}
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    left, right, low, high = min(xs), max(xs), min(0.0, *ys), max(ys)
    if high == low:
        high = low + 1
    if right == left:
        right = left + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (_WIDTH - _LEFT - 8)
        return across, 8 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 8)

    parts = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(left, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        x, _ = place(left + (right - left) * i / 4, low)
        label = f"{left + (right - left) * i / 4:,.0f}"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{label}</text>')
    for number, ((name, points), color) in enumerate(zip(curves.items(), _COLORS, strict=False)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{path}"/>')
        parts += [
            '<circle r="2" fill="{}" cx="{:.1f}" cy="{:.1f}"/>'.format(color, *place(x, y))
            for x, y in (points if len(points) <= 50 else [])
        ]
        if len(curves) > 1:
            where = f'x="{_WIDTH - 14}" y="{20 + 14 * number}" text-anchor="end" style="fill:{color}"'
            parts.append(f"<text {where}>{html.escape(name)}</text>")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'

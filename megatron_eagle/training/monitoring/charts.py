"""Charts as SVG text with a legend below, for pages that load nothing: curves, and shares stacked to one."""

import html
import math
import statistics
from collections.abc import Mapping, Sequence

Points = list[tuple[float, float]]

COLORS = ("#1f6fb2", "#d1622b", "#3a923a", "#8d5fb0", "#b8860b", "#4aa3a2", "#c24d7a", "#7a6a5d", "#5b6b8c")
_WIDTH, _HEIGHT = 500, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 22, 12, 26  # margins
_POINTS, _COLUMNS = 800, 160  # of a curve, of stacked shares: longer ones are drawn as means of neighbours


def line_chart(
    curves: dict[str, Points], *, from_zero: bool = True, marks: Sequence[tuple[float, str]] = ()
) -> str:
    """Curves over the same axes. `marks`: places on the x axis, each a dashed line with its text on hover."""
    curves = {name: _thin(points, _POINTS) for name, points in curves.items() if points}
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    axes = _Axes(min(xs), max(xs), *_nice_range(min(0.0, *ys) if from_zero else min(ys), max(ys)))
    parts = [axes.draw()]
    for x, text in marks:
        if axes.left <= x <= axes.right:
            at = f'x1="{axes.x(x):.1f}" x2="{axes.x(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
            parts.append(
                f'<line {at} stroke="#c33" stroke-dasharray="3 3"><title>{html.escape(text)}</title></line>'
            )
    for points, color in zip(curves.values(), _cycle(len(curves)), strict=True):
        line = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{line}"/>')
        if len(points) <= 50:
            parts += [
                f'<circle r="2.2" fill="{color}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"/>'
                for x, y in points
            ]
    return _svg(parts) + (_legend(list(curves)) if any(curves) else "")


def share_chart(xs: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """Shares of a whole, in per cent, stacked in the order of `shares`; each has a value at every x."""
    if len(xs) == 1:  # a single step gets the width of one
        xs, shares = [xs[0], xs[0] + 1], {name: [values[0]] * 2 for name, values in shares.items()}
    columns = {name: _thin(list(zip(xs, values, strict=True)), _COLUMNS) for name, values in shares.items()}
    axes = _Axes(min(xs), max(xs), 0.0, 100.0)
    places = [x for x, _ in next(iter(columns.values()))]
    parts, below = [axes.draw()], [0.0] * len(places)
    for points, color in zip(columns.values(), _cycle(len(columns)), strict=True):
        above = [low + 100 * share for low, (_, share) in zip(below, points, strict=True)]
        edge = list(zip(places, above, strict=True)) + list(zip(places, below, strict=True))[::-1]
        outline = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in edge)
        parts.append(f'<polygon fill="{color}" fill-opacity="0.75" points="{outline}"/>')
        below = above
    return _svg(parts) + _legend(list(columns))


def figure(title: str, note: str, chart: str) -> str:
    """A chart under its title."""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<figure><h2>{html.escape(title)}</h2>{note}{chart}</figure>"


class _Axes:
    """From values to places in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right = left, right if right > left else left + 1
        self._low, self._high = low, high

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _TOP + (self._high - value) / (self._high - self._low) * (_HEIGHT - _TOP - _BOTTOM)

    def draw(self) -> str:
        parts = []
        for value in _ticks(self._low, self._high):
            y = self.y(value)
            at = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line {at} stroke="#e3e3e3"/>')
            parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for value in _ticks(self.left, self.right):
            if value == round(value):  # iterations
                x = self.x(value)
                parts.append(
                    f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{_number(value)}</text>'
                )
        return "".join(parts)


def _nice_range(low: float, high: float) -> tuple[float, float]:
    """A range that holds both, with ticks at its ends."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), high if high > 0 else low + 1.0
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _step(low: float, high: float) -> float:
    """Of 1, 2 or 5 times a power of ten: gives four to eight ticks."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * 1.2)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    """As short as it is readable: 0.0002, 1.5, 2,000, 1.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _legend(names: list[str]) -> str:
    """Wraps where the page does: names may be many and long."""
    entries = (
        f'<span><b style="background:{color}"></b>{html.escape(name)}</span>'
        for name, color in zip(names, _cycle(len(names)), strict=True)
    )
    return f'<p class="legend">{"".join(entries)}</p>'


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _thin(points: Points, most: int) -> Points:
    """At most `most` points, each the mean of neighbours."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups]

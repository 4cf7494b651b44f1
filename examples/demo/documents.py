"""Draws the demo's two PDF files with matplotlib: reports of three pages that differ in subject and order.

Nothing in them depends on the time or the machine, so the same matplotlib draws the same bytes.
"""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

_SIZE = (4.5, 6.0)  # inches
_MONTHS = ["Jan", "Mar", "May", "Jul", "Sep", "Nov"]
_HARVEST = [1, 2, 9, 24, 38, 17]
_RAIN = [44, 36, 28, 15, 31, 52]


def draw_documents(folder: Path) -> list[Path]:
    """Write harvest.pdf and rain.pdf into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    reports = {
        "harvest.pdf": [
            lambda axes: _title(axes, "Apples", "Harvest of the year", "darkred", "mistyrose"),
            lambda axes: _bars(axes, _HARVEST, "tonnes", "firebrick"),
            lambda axes: _line(axes, _HARVEST, "tonnes in all", "darkorange"),
        ],
        "rain.pdf": [
            lambda axes: _title(axes, "Rain", "Weather of the city", "white", "midnightblue"),
            lambda axes: _line(axes, _RAIN, "mm in all", "teal"),
            lambda axes: _bars(axes, _RAIN, "mm", "royalblue"),
        ],
    }
    return [_write(folder / name, pages) for name, pages in reports.items()]


def _write(path: Path, pages: list[Callable[[Axes], None]]) -> Path:
    with PdfPages(path, metadata={"CreationDate": None}) as pdf:
        for draw in pages:
            figure = Figure(figsize=_SIZE, layout="constrained")
            draw(figure.add_subplot())
            pdf.savefig(figure)
    return path


def _title(axes: Axes, title: str, subtitle: str, ink: str, paper: str) -> None:
    axes.figure.set_facecolor(paper)
    axes.set_axis_off()
    axes.text(0.5, 0.6, title, size=44, weight="bold", color=ink, ha="center")
    axes.text(0.5, 0.45, subtitle, size=18, color=ink, ha="center")


def _bars(axes: Axes, values: list[int], unit: str, color: str) -> None:
    axes.bar(_MONTHS, values, color=color, width=0.8)
    axes.set_ylabel(unit)


def _line(axes: Axes, values: list[int], unit: str, color: str) -> None:
    totals = [sum(values[: i + 1]) for i in range(len(values))]
    axes.fill_between(_MONTHS, totals, color=color, alpha=0.35)
    axes.plot(_MONTHS, totals, color=color, linewidth=5)
    axes.set_ylabel(unit)

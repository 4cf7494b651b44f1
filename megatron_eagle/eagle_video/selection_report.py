"""A selection as one HTML file that needs nothing else: counts, histogram of cosines, pictures of clips."""

from collections.abc import Sequence
from fractions import Fraction
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_eagle.data.media.thumbnails import jpeg_url
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.eagle_video.features import Clip
from megatron_eagle.eagle_video.frames import frames_at, open_section
from megatron_eagle.eagle_video.selection import Decision, Selection, SelectionSettings, selection_summary
from megatron_eagle.files import write_whole
from megatron_eagle.problems import Problem

_STYLE = """
body { font: 14px/1.4 sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
figure { display: inline-block; width: 240px; margin: 0 12px 16px 0; vertical-align: top }
img { width: 118px; height: 80px; object-fit: contain; background: #eee }
figcaption { font-size: 12px; overflow-wrap: anywhere }
.low { fill: #2a7 } .high { fill: #b44 } text { font-size: 11px }
"""
_SIDE = 160  # pixels of a thumbnail's longer side


def write_selection_report(
    path: Path, selection: Selection, settings: SelectionSettings, n_pictures: int = 12, n_bins: int = 40
) -> None:
    """Write the report; `n_pictures` clips each of the kept and of the refused, spread over their cosines."""
    refused = [d for d in selection.decisions if d.refused]
    cosines = np.array([d.cosine for d in selection.decisions])
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Video selection</title><style>{_STYLE}</style>",
        f"<h1>Video selection</h1><pre>{escape(selection_summary(selection))}</pre>",
        f"<h2>Highest cosine to the training set, tau = {settings.tau:g}</h2>",
        _histogram(cosines, settings.tau, n_bins),
        f"<h2>Kept ({len(selection.kept):,})</h2>",
        *(_figure(d) for d in _spread(selection.kept, n_pictures)),
        f"<h2>Refused ({len(refused):,})</h2>",
        *(_figure(d) for d in _spread(refused, n_pictures)),
    ]
    write_whole(path, "\n".join(parts))


def _spread(decisions: Sequence[Decision], n: int) -> list[Decision]:
    """At most n of them, evenly over their order by cosine."""
    ordered = sorted(decisions, key=lambda d: d.cosine)
    if len(ordered) <= n:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (n - 1))] for i in range(n)]


def _histogram(cosines: np.ndarray, tau: float, n_bins: int) -> str:
    """Bars as SVG: green where candidates pass, red from tau on; one edge lies on tau exactly."""
    if not len(cosines) or cosines.min() < -1.5:
        return "<p>There are no clips to compare with.</p>"
    low, high = min(float(cosines.min()), tau), max(float(cosines.max()), tau) + 1e-6
    width = (high - low) / n_bins
    first = tau - np.ceil((tau - low) / width) * width
    edges = first + width * np.arange(n_bins + 2)
    counts, _ = np.histogram(cosines, edges)
    bars = []
    for i, count in enumerate(counts):
        height = 120 * count / counts.max()
        side = "low" if edges[i] + width / 2 < tau else "high"
        title = f"{edges[i]:.3f} to {edges[i + 1]:.3f}: {count}"
        bars.append(
            f"<rect class={side} x={20 + 16 * i} y={130 - height:.1f} width=14 height={height:.1f}>"
            f"<title>{title}</title></rect>"
        )
    labels = [f"<text x={20 + 16 * i} y=148>{edges[i]:.2f}</text>" for i in range(0, len(counts), 5)]
    return f"<svg width={40 + 16 * len(counts)} height=155>{''.join(bars + labels)}</svg>"


def _figure(decision: Decision) -> str:
    clips = [decision.clip] + ([decision.nearest] if decision.nearest else [])
    pictures = "".join(f'<img alt="" src="{source}">' if (source := _thumbnail(c)) else "" for c in clips)
    lines = [_name(decision.clip)]
    if decision.nearest:
        lines.append(f"cosine {decision.cosine:.3f} to {_name(decision.nearest)}")
    if decision.refused:
        lines.append(decision.refused)
    return f"<figure>{pictures}<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>"


def _name(clip: Clip) -> str:
    return f"{Path(clip.video).name} {clip.start:.1f}-{clip.end:.1f} s"


def _thumbnail(clip: Clip) -> str | None:
    """The middle frame as a data URL; None if the video cannot be read any more."""
    middle = Fraction(str(clip.start)) / 2 + Fraction(str(clip.end)) / 2
    try:
        metadata, _ = open_section(VideoSource(clip.video))
        picture = Image.fromarray(next(frames_at(metadata, [middle])))
    except Problem:
        return None
    return jpeg_url(picture, _SIDE)

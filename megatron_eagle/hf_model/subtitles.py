"""A video's subtitles between its frames: which of them are shown, and where.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). The rule is that of LongVideoBench's authors (longvideobench/LongVideoBench,
`longvideobench_dataset.py`): no line without a frame during which it is said.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

_FORM = "subtitles must be a list of [start, end, text], in seconds"


class Subtitle(NamedTuple):
    """A text, and from when to when it is shown, in seconds of the video's clock."""

    start: float
    end: float
    text: str


def read_subtitles(value: Any) -> tuple[Subtitle, ...]:
    """Subtitles as a message's part has them, `[[start, end, text], ...]`, in their order; empty ones are
    none.

    Raises:
        ValueError: they have another form.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{_FORM}, not {type(value).__name__}")
    for one in value:
        times = (
            one[:2] if isinstance(one, (list, tuple)) and len(one) == 3 and isinstance(one[2], str) else ()
        )
        if not times or any(isinstance(time, bool) or not isinstance(time, (int, float)) for time in times):
            raise ValueError(f"{_FORM}; one is {one!r}"[:200])
    return tuple(
        Subtitle(float(start), float(end), text.strip()) for start, end, text in value if text.strip()
    )


def between_frames(subtitles: Iterable[Subtitle], times: Sequence[float]) -> tuple[tuple[int, str], ...]:
    """The subtitles during which a frame is shown, each with the number of frames that stand before it.

    They are those whose times are not later than its middle, nor fewer than before the subtitle that it
    follows. One shorter than a second counts as a second around its middle.

    Args:
        times: of the frames, in seconds, in order.
    """
    found, before = [], 0
    for start, end, text in subtitles:
        middle = (start + end) / 2
        while before < len(times) and times[before] <= middle:
            before += 1
        low, high = (middle - 0.5, middle + 0.5) if end - start < 1 else (start, end)
        if any(low < time < high for time in times):
            found.append((before, text))
    return tuple(found)

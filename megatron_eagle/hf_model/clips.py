"""Which frames of a clip are shown, in training and in every export."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def spread(first: int, last: int, n: int) -> tuple[int, ...]:
    """`n` whole numbers from `first` to `last`, evenly apart, both included (one: the first)."""
    return tuple(np.linspace(first, last, n).round().astype(np.int64).tolist())


def shown_seconds(n: int, span: Fraction, last_duration: Fraction) -> Fraction:
    """How long a video of `n` frames is shown: the last one as long as the others are on average.

    Args:
        span: from the first frame's time to the last one's.
        last_duration: of the last frame, as the file says (0: it does not); what a single frame is shown.
    """
    return span + span / (n - 1) if n > 1 else last_duration or Fraction(1)


def clip_bounds(
    begin: Fraction, end: Fraction, start: Fraction | None, stop: Fraction | None
) -> tuple[Fraction, Fraction]:
    """Where a clip begins and ends: as asked for, but not beyond the video (None: the video's own end).

    Args:
        begin, end: of the video; start, stop: of the clip. All in seconds of the file's own clock.
    """
    return (
        begin if start is None else max(begin, start),
        end if stop is None else min(end, stop),
    )


def uneven_times(times: Sequence[int] | np.ndarray) -> np.ndarray | None:
    """The times of a clip's frames (in any unit) if their rate varies, or None.

    It varies if frames stray from their places at a constant rate by more than one frame. Times that a
    container has rounded, and a single frame that was lost, are no variable rate.
    """
    found = np.asarray(times, np.int64)
    offsets = (found - found[0]).astype(np.float64)
    gap = offsets[-1] / max(1, len(found) - 1)
    strays = np.ptp(offsets - gap * np.arange(len(found)))
    return found if strays > gap else None


def choose_frames(first: int, last: int, n: int, times: np.ndarray | None) -> tuple[int, ...]:
    """`n` frames of a clip, evenly apart in time, the first and the last one included (one: the first).

    At a constant rate this is the paper's rule, evenly apart in number (`spread`). Where the rate varies that
    rule would show the dense parts of a video and miss the slow ones, so that frames nearest to even times
    are taken instead, each once.

    Args:
        first, last: numbers of the clip's first and last frame.
        times: `uneven_times` of the frames from `first` to `last`.
    """
    if times is None:
        return spread(first, last, n)
    wanted = np.linspace(times[0], times[-1], n)
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)
    nearest = after - (wanted - times[after - 1] <= times[after] - wanted)
    # Each frame once: a later one where the nearest is taken, an earlier one where too few would be left.
    steps = np.arange(n)
    distinct = np.maximum.accumulate(nearest - steps) + steps
    return tuple((first + np.minimum(distinct, len(times) - n + steps)).tolist())

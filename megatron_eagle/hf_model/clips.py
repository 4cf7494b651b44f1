"""Which frames of a clip are shown, in training and in every export."""

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

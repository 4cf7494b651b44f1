"""What a supervised token weighs in the loss, before the global batch's normaliser."""

from collections.abc import Iterable

import numpy as np

LOSS_WEIGHTINGS = ("square", "token", "sample")


def answer_weights(lengths: Iterable[int], weighting: str, multi_turn: bool) -> np.ndarray:
    """Weight of a token by its answer number, float64 [answers + 1]; entry 0 is that of unsupervised tokens,
    0.

    In a sample with n supervised tokens each weighs 1 / sqrt(n) (`square`), 1 (`token`) or 1 / n (`sample`);
    `multi_turn` counts n per answer.  `square` is InternVL 2.5's square averaging.
    """
    n = np.array([1, *lengths], np.float64)
    if not multi_turn:
        n[1:] = n[1:].sum()
    weights = n ** {"square": -0.5, "token": 0.0, "sample": -1.0}[weighting]
    weights[0] = 0
    return weights

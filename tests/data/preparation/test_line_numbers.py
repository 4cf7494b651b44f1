"""Lines by file and number are what a list of pairs is."""

import numpy as np

from megatron_eagle.data.preparation.line_numbers import LineNumbers


def test_they_are_the_pairs():
    files = [np.array([0, 2]), np.zeros(0, np.int64), np.arange(5000)]
    pairs = [(0, 0), (0, 2), *((2, line) for line in range(5000))]
    lines = LineNumbers.of(files)
    assert list(lines) == pairs and len(lines) == len(pairs)
    assert list(lines[3:9]) == pairs[3:9] and lines[4501] == pairs[4501]
    chosen = {(0, 2), (2, 17), (1, 0)}
    assert list(lines.among(chosen)) == [pair for pair in pairs if pair in chosen]
    assert list(LineNumbers.of([])) == []

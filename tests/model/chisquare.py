"""How far counts are from what a distribution predicts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def deviation(counts: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """Pearson's chi-square of `counts` against `probs`, as a standard normal score (Wilson and Hilferty 1931).

    Cells that expect fewer than 8 are pooled; a count where `probs` is zero gives infinity.
    """
    if counts[probs == 0].any():
        return float("inf")
    expected = counts.sum() * probs / probs.sum()
    small = expected < 8
    cells = np.append(counts[~small], counts[small].sum()).astype(np.float64)
    means = np.append(expected[~small], expected[small].sum())
    cells, means = cells[means > 0], means[means > 0]
    freedom = len(cells) - 1
    statistic = float(((cells - means) ** 2 / means).sum())
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)

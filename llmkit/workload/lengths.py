"""How long prompts and outputs are: a fixed number, uniform, or a table of quantiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkit.workload.settings import Quantiles


def sample_lengths(
    lengths: int | tuple[int, int] | Quantiles, size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`size` lengths, int64, at least 1. `lengths` is what `settings.parse_lengths` returns.

    (LOW, HIGH) is uniform, both ends included. A quantile table is inverted with straight lines between its rows, so
    its quantiles are met up to rounding.
    """
    if isinstance(lengths, int):
        return np.full(size, lengths, dtype=np.int64)
    if isinstance(lengths[0], int):
        low, high = lengths
        return rng.integers(low, high, size=size, endpoint=True)
    quantiles, values = zip(*lengths, strict=True)
    drawn = np.interp(rng.random(size), quantiles, values)
    return np.asarray(np.rint(drawn), dtype=np.int64)

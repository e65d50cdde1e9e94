"""When requests arrive: all at once, Poisson, or gamma inter-arrival times."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def arrival_times(num_requests: int, rate: float, burstiness: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds from the start of the run, float64 [num_requests], rising; the last is exactly `num_requests / rate`.

    Gaps are gamma distributed with shape `burstiness` (1 makes a Poisson process, less makes bursts), then rescaled so
    that every seed offers the same load (as vLLM's `bench serve` does). `rate=inf`: all zero. A shape so small that
    every gap underflows to zero gives one burst at the end.
    """
    if math.isinf(rate):
        return np.zeros(num_requests)
    times = np.cumsum(rng.gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=num_requests))
    duration = num_requests / rate
    if not times[-1] > 0:
        return np.full(num_requests, duration)
    times *= duration / times[-1]
    times[-1] = duration
    return np.minimum(times, duration)  # rounding may lift others above the last

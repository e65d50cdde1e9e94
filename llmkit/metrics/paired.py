"""Comparing two arms measured in pairs: a t interval on the log-ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True, slots=True)
class RatioInterval:
    """Geometric mean of `num_pairs` ratios and its confidence interval; one pair has no interval."""

    ratio: float
    low: float | None
    high: float | None
    num_pairs: int
    confidence: float


def paired_ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> RatioInterval:
    """How many times larger `a` is than `b`, pair by pair.

    The interval assumes that the log-ratios are roughly normal, which holds for times and throughputs measured
    back to back; unlike a bootstrap it keeps its level with a handful of pairs. ValueError unless both have the
    same length, at least 1, and all values are positive.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"pairs are needed, got {len(a)} and {len(b)} values")
    if min(*a, *b) <= 0:
        raise ValueError("a ratio needs positive values")
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    mean, size = fmean(logs), len(logs)
    if size == 1:
        return RatioInterval(math.exp(mean), None, None, 1, confidence)
    half = student_t_quantile(0.5 + confidence / 2, size - 1) * stdev(logs) / math.sqrt(size)
    return RatioInterval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), size, confidence)


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t for which a Student-t variable with `degrees` of freedom stays below it with `probability` in [0.5, 1)."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"no quantile {probability} of a t distribution with {degrees} degrees of freedom")
    inside = 2 * probability - 1
    low, high = 0.0, math.pi / 2
    for _ in range(200):  # bisection on the angle, which is bounded where t is not
        angle = (low + high) / 2
        low, high = (angle, high) if _central_probability(angle, degrees) < inside else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)): Abramowitz & Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    first = degrees % 2
    term = cosine if first else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + first, degrees - 1, 2):
        term *= (k - 1) / k * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if first else sine * total

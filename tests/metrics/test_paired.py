"""The paired t interval: its quantiles against published tables, its coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmkit.metrics.paired import paired_ratio, student_t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [  # NIST/SEMATECH e-Handbook, table 1.3.6.7.2
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 7, 2.365),
        (0.975, 30, 2.042),
        (0.95, 5, 2.015),
        (0.995, 8, 3.355),
        (0.9, 100, 1.290),
    ],
)
def test_quantiles_agree_with_the_published_table(probability: float, degrees: int, expected: float) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, abs=6e-4)


def test_quantiles_approach_the_normal_distribution() -> None:
    assert student_t_quantile(0.975, 20_000) == pytest.approx(1.959964, abs=2e-4)
    assert student_t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("probability", "degrees"), [(1.0, 3), (0.4, 3), (0.9, 0)])
def test_impossible_quantiles_are_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        student_t_quantile(probability, degrees)


def test_the_interval_of_a_known_sample() -> None:
    # log-ratios 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t(0.975, 2) = 4.30265
    interval = paired_ratio([math.exp(0.1), math.exp(0.2), math.exp(0.3)], [1.0, 1.0, 1.0])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert interval.ratio == pytest.approx(math.exp(0.2))
    assert interval.low == pytest.approx(math.exp(0.2 - half), rel=1e-6)
    assert interval.high == pytest.approx(math.exp(0.2 + half), rel=1e-6)
    assert interval.num_pairs == 3


def test_swapping_the_arms_inverts_the_interval() -> None:
    a, b = [1.0, 2.5, 4.0], [2.0, 3.0, 3.5]
    forward, backward = paired_ratio(a, b), paired_ratio(b, a)
    assert forward.ratio == pytest.approx(1 / backward.ratio)
    assert backward.high is not None
    assert forward.low == pytest.approx(1 / backward.high)


def test_pairing_removes_what_both_arms_share() -> None:
    shared = [1.0, 10.0, 100.0, 3.0]
    interval = paired_ratio([2 * s for s in shared], shared)
    assert interval.low == pytest.approx(2.0)
    assert interval.high == pytest.approx(2.0)


def test_one_pair_has_no_interval() -> None:
    interval = paired_ratio([3.0], [2.0])
    assert (interval.ratio, interval.low, interval.high) == (1.5, None, None)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    num_trials, hits = 2000, 0
    for logs in rng.normal(0.3, 0.2, size=(num_trials, 5)):
        interval = paired_ratio(np.exp(logs).tolist(), [1.0] * 5)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= math.exp(0.3) <= interval.high
    assert hits / num_trials == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_values_that_make_no_pairs_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs|positive"):
        paired_ratio(a, b)

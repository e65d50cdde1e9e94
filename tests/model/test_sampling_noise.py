"""The noise is uniform, and unrelated between draws, positions and seeds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llmkit.model.sampling.noise import noise_key, uniforms
from tests.model.chisquare import deviation

NUM = 1 << 16


def stream(seed: int) -> NDArray[np.float64]:
    """Both draws of NUM consecutive positions, [2, NUM]."""
    positions = np.arange(NUM, dtype=np.uint64)
    return uniforms(np.full(NUM, noise_key(seed), dtype=np.uint64), positions)[:, :, 0]


def across_seeds(position: int) -> NDArray[np.float64]:
    """Both draws of NUM consecutive seeds at one position, [2, NUM]."""
    keys = np.array([noise_key(seed) for seed in range(NUM)], dtype=np.uint64)
    return uniforms(keys, np.full(NUM, position, dtype=np.uint64))[:, :, 0]


def is_even(values: NDArray[np.float64]) -> bool:
    cells = np.bincount((values * 256).astype(np.int64), minlength=256)
    return abs(deviation(cells, np.full(256, 1 / 256))) < 4


def is_unrelated(left: NDArray[np.float64], right: NDArray[np.float64]) -> bool:
    cells = np.bincount((left * 16).astype(np.int64) * 16 + (right * 16).astype(np.int64), minlength=256)
    return abs(deviation(cells, np.full(256, 1 / 256))) < 4 and abs(np.corrcoef(left, right)[0, 1]) < 4 / NUM**0.5


def test_it_is_splitmix64() -> None:
    """The first two outputs of the reference implementation seeded with 1234567, cut to 48 bits."""
    values = uniforms(np.array([1234567], dtype=np.uint64), np.array([0], dtype=np.uint64))
    assert values.shape == (2, 1, 1)
    assert (values[:, 0, 0] * 2**48).tolist() == [6457827717110365317 >> 16, 3203168211198807973 >> 16]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_positions_of_one_seed(seed: int) -> None:
    first, second = stream(seed)
    assert is_even(first) and is_even(second)
    assert is_unrelated(first, second)
    for lag in (1, 2, 16):
        assert is_unrelated(first[lag:], first[:-lag]) and is_unrelated(second[lag:], first[:-lag])
        assert is_unrelated(first[lag:], second[:-lag])


@pytest.mark.parametrize("position", [0, 1, 1 << 20])
def test_seeds_at_one_position(position: int) -> None:
    first, second = across_seeds(position)
    assert is_even(first) and is_even(second) and is_unrelated(first, second)
    assert is_unrelated(first[1:], first[:-1]) and is_unrelated(second[1:], first[:-1])


def test_neighbouring_seeds_share_nothing_along_a_sequence() -> None:
    (first, second), (other, other_second) = stream(7), stream(8)
    assert is_unrelated(first, other) and is_unrelated(second, other) and is_unrelated(first, other_second)
    assert is_unrelated(first[1:], other[:-1]) and is_unrelated(first[:-1], other[1:])


def test_no_seed_continues_another() -> None:
    """A SplitMix64 state two increments ahead, taken as a seed, must not give the same sequence shifted."""
    (first, _), (other, _) = stream(7), stream((7 + 2 * 0x9E3779B97F4A7C15) % 2**64)
    assert is_unrelated(first[1:], other[:-1]) and not (first[1:] == other[:-1]).any()


def test_every_bit_of_seed_and_position_moves_every_bit() -> None:
    def bits(seed: int, position: int) -> NDArray[np.uint64]:
        return (uniforms(np.array([noise_key(seed)], np.uint64), np.array([position], np.uint64)) * 2**48).astype(
            np.uint64
        )

    moved = np.zeros((2, 48))
    trials = 0
    for start in range(40):
        base = bits(start, start * 31)
        for bit in range(20):
            for changed in (bits(start ^ (1 << bit), start * 31), bits(start, (start * 31) ^ (1 << bit))):
                difference = (base ^ changed)[:, 0, 0]
                moved += (difference[:, None] >> np.arange(48, dtype=np.uint64)) & np.uint64(1)
                trials += 1
    assert np.abs(moved / trials - 0.5).max() < 4.5 * 0.5 / trials**0.5


def test_the_largest_value_stays_below_any_total() -> None:
    largest = 1 - 2.0**-48
    totals = np.concatenate([np.random.default_rng(0).random(10000), [5e-324 * 2**60, 1e-30, 1.0, 2.0**60]])
    assert (totals * largest < totals).all()

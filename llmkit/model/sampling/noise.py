"""Random numbers as a function of (seed, position): no state, so no dependence on batch order or history.

The generator is SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based hash: the seed is mixed into a key, and
number c of a key is `mix(key + c * GOLDEN)`. It is computed on the host (a few microseconds for a whole step) because
the host knows every position; the result is a small input of the device's work, also under graph capture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_GOLDEN_64 = np.uint64(_GOLDEN)
_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31))
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_DRAWS = np.array([[[1]], [[2]]], dtype=np.uint64)
_BITS = 48


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function: a bijection of 64 bits in which every input bit moves every output bit."""
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])


def noise_key(seed: int) -> int:
    """The 64-bit key of `seed`; seeds differing in one bit get unrelated keys."""
    mixed = _mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))
    return int(_mix(mixed + _GOLDEN_64)[0])


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Two independent uniforms in [0, 1) per row: float64 [2, R, 1] from `keys` and `positions`, both uint64 [R].

    They are multiples of 2**-48, so `u * total < total` holds after rounding to float64 for every positive total.
    """
    counters = (positions << np.uint64(1))[:, None] + _DRAWS
    bits = _mix(keys[:, None] + counters * _GOLDEN_64) >> np.uint64(64 - _BITS)
    return bits.astype(np.float64) * 2.0**-_BITS

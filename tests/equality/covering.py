"""Few test cases that still bring every pair of choices together."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product

Case = dict[str, object]
Pair = tuple[tuple[str, object], tuple[str, object]]


def pairwise(factors: Mapping[str, Sequence[object]], seed: int = 0) -> list[Case]:
    """Cases such that every two values of different factors meet in one; greedy, and the same on every run."""
    rng = random.Random(seed)
    names = sorted(factors, key=lambda name: -len(factors[name]))
    missing = dict.fromkeys(
        ((a, one), (b, other)) for a, b in combinations(names, 2) for one, other in product(factors[a], factors[b])
    )
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in names:
            if name not in case:
                values = rng.sample(list(factors[name]), len(factors[name]))
                case[name] = max(values, key=lambda value: sum(p in missing for p in _pairs(case, name, value, names)))
        for a, b in combinations(names, 2):
            missing.pop(((a, case[a]), (b, case[b])), None)
        cases.append({name: case[name] for name in factors})
    return cases


def _pairs(case: Case, name: str, value: object, names: list[str]) -> list[Pair]:
    others = [other for other in names if other in case]
    return [_ordered((name, value), (other, case[other]), names) for other in others]


def _ordered(a: tuple[str, object], b: tuple[str, object], names: list[str]) -> Pair:
    return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)

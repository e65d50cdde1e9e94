"""Arrivals x lengths x shared prefixes -> timed requests. Same settings and seed, same requests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmkit.workload.arrivals import arrival_times
from llmkit.workload.lengths import sample_lengths
from llmkit.workload.prompts import prompt_source
from llmkit.workload.protocol import ModelBounds
from llmkit.workload.requests import TimedRequest
from llmkit.workload.settings import MAX_LEN, SyntheticSettings


def synthesise(settings: SyntheticSettings, rate: float, burstiness: float, bounds: ModelBounds) -> list[TimedRequest]:
    """Requests in order of arrival.

    Each property has a random stream of its own, so changing the rate leaves prompts and lengths as they were. With
    prefix groups, a request belongs to one drawn uniformly and starts with its `prefix_len` tokens.
    """
    size, seed = settings.num_requests, settings.seed
    times_rng, prompt_rng, output_rng, text_rng, group_rng, priority_rng, hint_rng, tenant_rng, due_rng = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(9)
    )
    times = arrival_times(size, rate, burstiness, times_rng)
    prompt_lens = sample_lengths(settings.prompt_len, size, prompt_rng)
    output_lens = sample_lengths(settings.max_tokens, size, output_rng)
    draw = prompt_source(settings.prompt_file, bounds, text_rng)
    prefixes = [draw(settings.prefix_len) for _ in range(settings.prefix_groups)] or [()]
    groups = group_rng.integers(len(prefixes), size=size)
    priorities = priority_rng.integers(settings.priorities, size=size)
    hints = _hints(settings.hint_error, output_lens, hint_rng)
    tenants = _tenants(settings, tenant_rng)
    columns = (column.tolist() for column in (times, prompt_lens, output_lens, groups, priorities))
    deadlines = _deadlines(settings.deadline_seconds, times, due_rng)
    return [
        TimedRequest(time, prefixes[group] + draw(prompt_len), max_tokens, priority, tenant, deadline, hint)
        for time, prompt_len, max_tokens, group, priority, tenant, deadline, hint in zip(
            *columns, tenants, deadlines, hints, strict=True
        )
    ]


def _deadlines(
    after: tuple[float, float] | None, times: NDArray[np.float64], rng: np.random.Generator
) -> list[float] | list[None]:
    """Arrivals plus seconds drawn uniformly from `after`."""
    if after is None:
        return [None] * len(times)
    deadlines: list[float] = (times + rng.uniform(*after, size=len(times))).tolist()
    return deadlines


def _tenants(settings: SyntheticSettings, rng: np.random.Generator) -> list[str]:
    """Names, one a request: "tenant0" sends the most (Zipf's law with exponent `tenant_skew`)."""
    if not settings.tenants:
        return [""] * settings.num_requests
    weights = np.arange(1.0, settings.tenants + 1.0) ** -settings.tenant_skew
    drawn = rng.choice(settings.tenants, size=settings.num_requests, p=weights / weights.sum())
    return [f"tenant{number}" for number in drawn.tolist()]


def _hints(error: float | None, lengths: NDArray[np.int64], rng: np.random.Generator) -> list[int] | list[None]:
    """`lengths` times a log-normal factor whose logarithm has standard deviation `error`, within [1, MAX_LEN]."""
    if error is None:
        return [None] * len(lengths)
    guesses = np.rint(lengths * np.exp(error * rng.standard_normal(len(lengths))))
    hints: list[int] = np.clip(guesses, 1, MAX_LEN).astype(np.int64).tolist()
    return hints

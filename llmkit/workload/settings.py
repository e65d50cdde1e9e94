"""Options of the workloads. Imported whenever workloads are listed, so nothing heavy here."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from llmkit.interfaces.settings import Settings

MAX_LEN = 1 << 22
Quantiles = tuple[tuple[float, int], ...]


def parse_lengths(value: Any) -> int | tuple[int, int] | Quantiles:
    """Check a length distribution: N, [LOW, HIGH] or [[QUANTILE, LENGTH], ...]; ValueError says what is wrong."""
    if _is_length(value):
        return int(value)
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise ValueError("give N, [LOW, HIGH] or [[0, MIN], ..., [1, MAX]]")
    if len(value) == 2 and all(_is_length(bound) for bound in value):
        if value[0] > value[1]:
            raise ValueError(f"the low end {value[0]} is above the high end {value[1]}")
        return int(value[0]), int(value[1])
    return _parse_quantiles(value)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_LEN


def _parse_quantiles(rows: list[Any] | tuple[Any, ...]) -> Quantiles:
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 2 or not _is_length(row[1]):
            raise ValueError(f"{row!r} is not [QUANTILE, LENGTH] with a length from 1 to {MAX_LEN}")
    table = tuple((float(quantile), int(length)) for quantile, length in rows)
    quantiles, lengths = zip(*table, strict=True)
    if quantiles[0] != 0.0 or quantiles[-1] != 1.0:
        raise ValueError("a quantile table starts at 0 and ends at 1")
    if any(a >= b for a, b in pairwise(quantiles)) or list(lengths) != sorted(lengths):
        raise ValueError("quantiles must rise strictly and lengths must not fall")
    return table


# Any: a union would report each wrong value once per member.
Lengths = Annotated[Any, AfterValidator(parse_lengths)]


class ServedSettings(Settings):
    """Options of every workload that is played against the engine."""

    ignore_eos: bool = Field(default=True, description="generate exactly max_tokens for each request")
    warm_up: bool = Field(default=True, description="run a few steps unmeasured first; false: measure a cold engine")
    goodput_ttft_ms: float | None = Field(
        default=None, gt=0.0, description="goodput limit on the time to first token, ms"
    )
    goodput_tpot_ms: float | None = Field(
        default=None, gt=0.0, description="goodput limit on the time per output token, ms"
    )
    goodput_e2el_ms: float | None = Field(
        default=None, gt=0.0, description="goodput limit on the end-to-end latency, ms"
    )


class SyntheticSettings(ServedSettings):
    """Lengths, shared prefixes and prompts. Lengths: N, [LOW, HIGH] (uniform) or [[0, MIN], ..., [1, MAX]]."""

    num_requests: int = Field(default=64, ge=1, le=1_000_000, description="how many requests")
    prompt_len: Lengths = Field(default=(16, 128), description="prompt tokens, the shared prefix not counted")
    max_tokens: Lengths = Field(default=(16, 64), description="output tokens")
    prefix_groups: int = Field(default=0, ge=0, le=1_000_000, description="groups of requests that share a prefix")
    prefix_len: int = Field(default=0, ge=0, le=MAX_LEN, description="tokens of each shared prefix")
    priorities: int = Field(default=1, ge=1, le=1000, description="priorities are drawn from 0 to this, exclusive")
    hint_error: float | None = Field(
        default=None, ge=0.0, le=10.0, description="give length hints, this far off (std of the log); null: give none"
    )
    tenants: int = Field(default=0, ge=0, le=1000, description="tenants the requests come from; 0: nobody's")
    tenant_skew: float = Field(default=0.0, ge=0.0, le=10.0, description="tenant k's share falls like k^-skew")
    deadline_seconds: tuple[float, float] | None = Field(
        default=None, description="deadlines are drawn from LOW to HIGH seconds after arrival; null: none"
    )
    prompt_file: str = Field(default="", description="text file to cut prompts from; empty: random token ids")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of arrivals, lengths and prompts")

    @model_validator(mode="after")
    def _deadlines_rise(self) -> SyntheticSettings:
        if self.deadline_seconds is not None and not 0.0 <= self.deadline_seconds[0] <= self.deadline_seconds[1] < 1e9:
            raise ValueError("deadline_seconds: give [LOW, HIGH] with 0 <= LOW <= HIGH")
        return self

    @model_validator(mode="after")
    def _prefix_is_whole(self) -> SyntheticSettings:
        if bool(self.prefix_groups) != bool(self.prefix_len):
            raise ValueError("prefix_groups and prefix_len go together: give both or neither")
        return self


class BatchSettings(SyntheticSettings):
    """All requests at once."""


class PoissonSettings(SyntheticSettings):
    """Poisson arrivals."""

    rate: float = Field(default=8.0, gt=0.0, description="requests per second; .inf: all at once")


class ShortLongSettings(PoissonSettings):
    """Many short outputs and a few long ones, with length hints: what `sjf` is for."""

    num_requests: int = Field(default=200, ge=1, le=1_000_000, description="how many requests")
    rate: float = Field(default=50.0, gt=0.0, description="requests per second; .inf: all at once")
    max_tokens: Lengths = Field(default=((0.0, 4), (0.8, 32), (1.0, 256)), description="output tokens")
    hint_error: float | None = Field(
        default=0.3, ge=0.0, le=10.0, description="give length hints, this far off (std of the log); null: give none"
    )


class TenantsSettings(PoissonSettings):
    """One tenant asks for far more than its share of the machine, three ask for less: what `fair` is for."""

    num_requests: int = Field(default=200, ge=1, le=1_000_000, description="how many requests")
    rate: float = Field(default=80.0, gt=0.0, description="requests per second; .inf: all at once")
    tenants: int = Field(default=4, ge=0, le=1000, description="tenants the requests come from; 0: nobody's")
    tenant_skew: float = Field(default=2.0, ge=0.0, le=10.0, description="tenant k's share falls like k^-skew")


class DeadlinesSettings(PoissonSettings):
    """More requests than the machine can answer in time, each with a deadline: what `deadline` is for."""

    num_requests: int = Field(default=200, ge=1, le=1_000_000, description="how many requests")
    rate: float = Field(default=80.0, gt=0.0, description="requests per second; .inf: all at once")
    deadline_seconds: tuple[float, float] | None = Field(
        default=(0.2, 1.0), description="deadlines are drawn from LOW to HIGH seconds after arrival; null: none"
    )


class SharedPrefixesSettings(PoissonSettings):
    """Many long prefixes, more than the cache holds, each shared by a few requests: what `prefix_aware` is for."""

    num_requests: int = Field(default=200, ge=1, le=1_000_000, description="how many requests")
    rate: float = Field(default=50.0, gt=0.0, description="requests per second; .inf: all at once")
    prefix_groups: int = Field(default=32, ge=0, le=1_000_000, description="groups of requests that share a prefix")
    prefix_len: int = Field(default=256, ge=0, le=MAX_LEN, description="tokens of each shared prefix")


class GammaSettings(PoissonSettings):
    """Gamma inter-arrival times."""

    burstiness: float = Field(
        default=0.5, gt=0.0, le=1e6, description="shape of the gamma distribution; 1: Poisson; less: bursts"
    )


class TraceSettings(ServedSettings):
    """Requests from a JSONL file."""

    path: str = Field(default="", description="JSONL file, one request a line")
    num_requests: int = Field(default=0, ge=0, le=10_000_000, description="play only the first so many lines; 0: all")
    time_scale: float = Field(default=1.0, gt=0.0, le=1e6, description="arrival times are multiplied by this")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of prompts of which only the length is given")


class NamedSettings(ServedSettings):
    """A published workload, token for token."""

    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of lengths and prompts; 0 is the published one")


def parse_axis(value: Any) -> tuple[int, ...]:
    """Check one axis of the grid: a whole number or a list of different ones, each at least 1."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(_is_length(entry) for entry in values):
        raise ValueError(f"give a list of whole numbers from 1 to {MAX_LEN}")
    if len(set(values)) < len(values):
        raise ValueError("a value stands twice")
    return values


Axis = Annotated[Any, AfterValidator(parse_axis)]


class GridSettings(Settings):
    """llmkit against `transformers.generate`, one prompt after the other, over prompt length x batch x output."""

    prompt_len: Axis = Field(default=(8, 32, 64, 128), description="prompt lengths, tokens")
    batch_size: Axis = Field(default=(1, 4, 8), description="prompts submitted at once")
    max_tokens: Axis = Field(default=(16, 32, 64), description="output lengths, tokens")
    repeats: int = Field(
        default=3, ge=1, le=100, description="measurements of each cell, arms interleaved; the median counts"
    )
    time_limit: float = Field(default=150.0, gt=0.0, description="seconds; no further repeat starts that would pass it")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="seed of the prompts")

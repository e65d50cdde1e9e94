"""Records -> the numbers of METRICS: one flat dictionary with vLLM's keys. None where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmkit.metrics.device_time import device_share, host_seconds
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import RequestRecord, StepRecord

SCHEMA_VERSION = 1
PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class GoodputLimits:
    """A request is good if it meets all that are given; milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def are_met(self, record: RequestRecord) -> bool:
        """Whether a completed request was fast enough; one token alone has no time per output token to miss."""
        limits = ((self.ttft_ms, record.ttft), (self.tpot_ms, record.tpot or 0.0), (self.e2el_ms, record.e2el))
        return all(limit is None or (value is not None and value * 1e3 <= limit) for limit, value in limits)

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2el_ms))


def summarise(
    recorder: MetricsRecorder, limits: GoodputLimits | None = None, device: str = "cpu", interrupted: bool = False
) -> dict[str, Any]:
    """Everything about a run that is one number. Latencies and token counts are those of completed requests."""
    records = list(recorder.requests.values())
    completed = [record for record in records if record.is_completed]
    return {
        "schema_version": SCHEMA_VERSION,
        "interrupted": interrupted,
        "num_prompts": len(records),
        **throughputs(records, completed, recorder.duration, limits),
        **latencies(completed),
        "tenants": tenants(completed),
        **engine_numbers(records, recorder.steps, recorder.duration, device),
    }


def throughputs(
    records: Sequence[RequestRecord],
    completed: Sequence[RequestRecord],
    duration: float,
    limits: GoodputLimits | None = None,
) -> dict[str, Any]:
    """Counts, and counts per second of `duration`."""
    num_input = sum(record.num_prompt_tokens for record in completed)
    num_output = sum(record.num_output_tokens for record in completed)
    due = [record for record in records if record.deadline is not None]
    num_good = sum(limits.are_met(record) for record in completed) if limits else None

    def per_second(count: int | None) -> float | None:
        return count / duration if count is not None and duration > 0 else None

    return {
        "duration": duration,
        "completed": len(completed),
        "failed": sum(record.finish_reason == "error" for record in records),
        "aborted": sum(record.finish_reason == "abort" for record in records),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": per_second(len(completed)),
        "input_throughput": per_second(num_input),
        "output_throughput": per_second(num_output),
        "total_token_throughput": per_second(num_input + num_output),
        "request_goodput": per_second(num_good),
        "deadlines_met": _share(sum(record.is_in_time for record in due), len(due)),
    }


def latencies(completed: Iterable[RequestRecord]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles of every latency, in milliseconds."""
    pools: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for record in completed:
        pools["itl"].extend(record.itl)
        for name in ("ttft", "tpot", "e2el"):
            value = getattr(record, name)
            if value is not None:
                pools[name].append(value)
    summary: dict[str, float | None] = {}
    for name, pool in pools.items():
        summary |= {f"{statistic}_{name}_ms": value for statistic, value in distribution(pool).items()}
    return summary


def tenants(completed: Sequence[RequestRecord]) -> dict[str, dict[str, Any]]:
    """What each tenant got: completed requests, output tokens, mean latencies in ms. Empty if there is only one."""
    pools: dict[str, list[RequestRecord]] = {}
    for record in completed:
        pools.setdefault(record.tenant, []).append(record)
    if len(pools) < 2:
        return {}
    return {
        name: {
            "completed": len(pool),
            "total_output_tokens": sum(record.num_output_tokens for record in pool),
            "mean_ttft_ms": distribution([record.ttft for record in pool if record.ttft is not None])["mean"],
            "mean_e2el_ms": distribution([record.e2el for record in pool if record.e2el is not None])["mean"],
        }
        for name, pool in sorted(pools.items())
    }


def distribution(seconds: Sequence[float]) -> Mapping[str, float | None]:
    """Statistics of `seconds` in milliseconds; percentiles interpolate linearly, std is the population's."""
    names = ("mean", "median", "std", *(f"p{percentile}" for percentile in PERCENTILES))
    if not len(seconds):
        return dict.fromkeys(names)
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    percentiles = np.percentile(values, PERCENTILES, method="linear")
    numbers = (values.mean(), np.median(values), values.std(), *percentiles)
    return dict(zip(names, map(float, numbers), strict=True))


def engine_numbers(
    records: Sequence[RequestRecord], steps: Sequence[StepRecord], duration: float, device: str
) -> dict[str, Any]:
    """Memory, reuse and host time. Shares of the KV cache are means over steps, weighted by how long each ran."""
    num_computed = sum(step.num_tokens for step in steps)
    num_blocks = [s.num_used_blocks + s.num_cached_blocks + s.num_free_blocks for s in steps]
    started = [record for record in records if record.first_scheduled_time is not None]
    num_prompt = sum(record.num_prompt_tokens for record in started)
    num_hit = sum(record.num_cached_tokens for record in started)
    on_device = device_share(steps, duration)
    return {
        "num_steps": len(steps),
        "num_preemptions": sum(record.num_preemptions for record in records),
        "tokens_per_step": num_computed / len(steps) if steps else None,
        "max_concurrent_requests": max((step.num_running for step in steps), default=0),
        "recompute_tax": _share(sum(step.num_recomputed_tokens for step in steps), num_computed),
        "num_saved_blocks": sum(step.num_saved_blocks for step in steps),
        "num_restored_blocks": sum(step.num_restored_blocks for step in steps),
        "kv_utilisation": _weighted_share([s.num_used_blocks for s in steps], num_blocks, steps),
        "kv_waste": _weighted_share(
            [s.num_unwritten_slots for s in steps], [s.num_reserved_slots for s in steps], steps
        ),
        "prefix_hit_tokens": num_hit,
        "prefix_queried_tokens": num_prompt,
        "prefix_hit_rate": _share(num_hit, num_prompt),
        "host_us_per_step": host_seconds(steps, device) / len(steps) * 1e6 if steps else None,
        "gpu_idle": None if on_device is None else 1.0 - on_device,
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _weighted_share(parts: Sequence[int], wholes: Sequence[int], steps: Sequence[StepRecord]) -> float | None:
    """Sum of parts over sum of wholes, each step counted for as long as it ran; equally if no time passed."""
    times = [step.landed_at - step.launched_at for step in steps]
    weights = times if any(times) else [1.0] * len(steps)
    whole = sum(weight * count for weight, count in zip(weights, wholes, strict=True))
    return sum(weight * count for weight, count in zip(weights, parts, strict=True)) / whole if whole else None

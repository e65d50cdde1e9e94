"""What `benchmarks/schedulers.py` draws: one panel says one thing about a baseline's run and a scheduler's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import RequestRecord
from llmkit.report.style import BLUE, GREY, ORANGE
from llmkit.workload.requests import TimedRequest

BASELINE = "continuous"


def colour(run: Run) -> str:
    """The baseline's, or the scheduler's."""
    return ORANGE if run.scheduler == BASELINE else BLUE


@dataclass(frozen=True)
class Run:
    """One scheduler on one workload: what was asked, what was seen, `result.json`'s numbers."""

    scheduler: str
    requests: Sequence[TimedRequest]
    recorder: MetricsRecorder
    numbers: Mapping[str, Any]

    @property
    def completed(self) -> list[RequestRecord]:
        """Requests that ended by themselves, in order of arrival."""
        return [record for record in self.recorder.requests.values() if record.is_completed]


Panel = Callable[[Any, Sequence[Run]], None]


def shares(label: str, values: Callable[[Run], Sequence[float]]) -> Panel:
    """A panel: the share of requests at or below each value."""

    def draw(axes: Any, runs: Sequence[Run]) -> None:
        for run in runs:
            ranked = sorted(values(run))
            y = [100 * (rank + 1) / len(ranked) for rank in range(len(ranked))]
            axes.step(ranked, y, where="post", color=colour(run), linewidth=1.5)
        axes.set_xscale("log")
        axes.set(xlabel=label, ylabel="share of requests at or below, %", ylim=(0, 100))

    return draw


def bars(label: str, unit: str, groups: Callable[[Run], Mapping[str, float]]) -> Panel:
    """A panel: one bar per group and run."""

    def draw(axes: Any, runs: Sequence[Run]) -> None:
        width = 0.8 / len(runs)
        for index, run in enumerate(runs):
            heights = groups(run)
            x = [place + (index - (len(runs) - 1) / 2) * width for place in range(len(heights))]
            axes.bar(x, list(heights.values()), width * 0.92, color=colour(run))
            axes.set_xticks(range(len(heights)), list(heights))
        axes.set(xlabel=label, ylabel=unit, ylim=(0, None))

    return draw


def sweep(
    label: str, unit: str, metric: Callable[[Run], float], values: Sequence[int], again: Callable[[str, int], Run]
) -> Panel:
    """A panel: the metric of runs `again(scheduler, value)`."""

    def draw(axes: Any, runs: Sequence[Run]) -> None:
        for run in runs:
            y = [metric(again(run.scheduler, value)) for value in values]
            axes.plot(values, y, marker="o", color=colour(run))
        axes.set(xlabel=label, ylabel=unit, ylim=(0, 105), xlim=(0, None))

    return draw


def lateness(axes: Any, runs: Sequence[Run]) -> None:
    """A panel: the share of all requests that ended so long after their deadline at most."""
    for run in runs:
        ranked = sorted(r.token_times[-1] - (r.deadline or 0.0) for r in run.completed)
        y = [100 * (rank + 1) / len(run.requests) for rank in range(len(ranked))]
        axes.step(ranked, y, where="post", color=colour(run), linewidth=1.5)
    axes.axvline(0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="end after the deadline, s (refused: never)", ylabel="share of all requests, %", ylim=(0, 100))


def by_output_length(run: Run) -> dict[str, float]:
    """Mean latency of requests with so many output tokens, ms."""
    edges = (1, 16, 32, 64, 128, 257)
    return {
        f"{low} to {high - 1}": 1e3 * fmean(r.e2el or 0.0 for r in run.completed if low <= r.num_output_tokens < high)
        for low, high in pairwise(edges)
    }


def by_tenant(statistic: Callable[[Sequence[float]], float]) -> Callable[[Run], dict[str, float]]:
    """A statistic of each tenant's times to first token, ms; its share of the requests below its name."""

    def groups(run: Run) -> dict[str, float]:
        names = sorted({record.tenant for record in run.completed})
        pools = {name: [1e3 * (r.ttft or 0.0) for r in run.completed if r.tenant == name] for name in names}
        return {f"{name}\n{len(pool) / len(run.completed):.0%}": statistic(pool) for name, pool in pools.items()}

    return groups


def p95(values: Sequence[float]) -> float:
    """The 95th percentile, the lower of two."""
    return sorted(values)[int(0.95 * (len(values) - 1))]


def ttfts(run: Run) -> list[float]:
    """Times to first token, ms."""
    return [1e3 * (record.ttft or 0.0) for record in run.completed]

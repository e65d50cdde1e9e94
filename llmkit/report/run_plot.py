"""The picture of a served run: queues, KV blocks and batch over time, and how latencies are distributed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.records import StepRecord
from llmkit.report.style import COLOURS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def run_picture(recorder: MetricsRecorder) -> bytes:
    """A PNG of `run_figure`."""
    buffer = io.BytesIO()
    run_figure(recorder).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def run_figure(recorder: MetricsRecorder) -> Figure:
    """Four panels; empty ones say so."""
    figure, axes = new_figure(2, 2, (11.0, 6.5))
    times, steps = _timeline(recorder)

    def values(field: str) -> list[int]:
        return [0 if step is None else getattr(step, field) for step in steps]

    _over_time(axes[0, 0], times, {"running": values("num_running"), "waiting": values("num_waiting")}, "requests")
    _over_time(axes[0, 1], times, {"blocks in use": values("num_used_blocks")}, "KV blocks")
    _over_time(axes[1, 0], times, {"tokens": values("num_tokens")}, "tokens in the step")
    _distributions(axes[1, 1], recorder)
    return figure


def _timeline(recorder: MetricsRecorder) -> tuple[list[float], list[StepRecord | None]]:
    """Seconds since the start, and the step that ended there; None: until there nobody ran, waited or held a block."""
    times: list[float] = []
    steps: list[StepRecord | None] = []
    for step in recorder.steps:
        if step.idle_before:
            times.append(step.planned_at - recorder.started_at)
            steps.append(None)
        times.append(step.landed_at - recorder.started_at)
        steps.append(step)
    return times, steps


def _over_time(axes: Axes, times: Sequence[float], series: dict[str, list[int]], label: str) -> None:
    for colour, (name, values) in zip(COLOURS, series.items(), strict=False):
        axes.step(times, values, where="pre", color=colour, label=name, linewidth=1.2)
    axes.set_xlabel("time since the start, s")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    if len(series) > 1 and times:
        _legend(axes)
    tidy(axes, is_empty=not times)


def _distributions(axes: Axes, recorder: MetricsRecorder) -> None:
    """Share of requests (for ITL: of gaps) at or below each latency."""
    completed = [record for record in recorder.requests.values() if record.is_completed]
    pools: dict[str, list[float | None]] = {
        "TTFT": [record.ttft for record in completed],
        "ITL": [gap for record in completed for gap in record.itl],
        "end to end": [record.e2el for record in completed],
    }
    drawn = False
    for colour, (name, pool) in zip(COLOURS, pools.items(), strict=False):
        values = sorted(value * 1e3 for value in pool if value)
        if values:
            drawn = True
            shares = [100 * (rank + 1) / len(values) for rank in range(len(values))]
            axes.step(values, shares, where="post", color=colour, label=name, linewidth=1.2)
    if drawn:
        axes.set_xscale("log")
        _legend(axes)
    axes.set_xlabel("latency, ms (log scale)")
    axes.set_ylabel("share at or below, %")
    axes.set_ylim(0, 100)
    tidy(axes, is_empty=not drawn)


def _legend(axes: Axes) -> None:
    """Above the panel, where it covers no curve."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)

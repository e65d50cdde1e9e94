"""Host and device time from the steps' four time stamps, whether steps overlap or not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from llmkit.metrics.records import StepRecord


def in_flight_seconds(steps: Sequence[StepRecord]) -> float:
    """Time during which at least one step was launched and had not landed; `steps` in the order they landed."""
    total, covered = 0.0, float("-inf")
    for step in steps:
        total += max(0.0, step.landed_at - max(step.launched_at, covered))
        covered = max(covered, step.landed_at)
    return total


def device_share(steps: Sequence[StepRecord], duration: float) -> float | None:
    """Share of the run with a step in flight: an upper bound of the time the device was busy, since the host's own
    preparation inside a launch counts too."""
    return in_flight_seconds(steps) / duration if duration > 0 else None


def host_seconds(steps: Sequence[StepRecord]) -> float:
    """Host time on the critical path: no step in flight although requests were there to run.

    That is planning the first step, the gaps between a landing and the next launch, less the time slept for want of
    requests, and taking in the last result. Host work that ran while a step was in flight costs nothing here.
    """
    if not steps:
        return 0.0
    first, last = steps[0], steps[-1]
    gaps = sum(max(0.0, after.launched_at - before.landed_at - after.idle_before) for before, after in pairwise(steps))
    return first.launched_at - first.planned_at + gaps + last.finished_at - last.landed_at

"""Host time from the steps' time stamps, and how long the device worked, whether steps overlap or not."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.metrics.records import StepRecord


def host_seconds(steps: Sequence[StepRecord], device: str) -> float:
    """Time the host worked on `steps`, whether the device worked meanwhile or not: to plan, launch and land them.

    Waiting for a result is no work. On a CPU the launch is the computation itself, and does not count either.
    """
    ends = [step.launched_at if device == "cpu" else step.sent_at for step in steps]
    return sum(end - s.planned_at + s.finished_at - s.landed_at for s, end in zip(steps, ends, strict=True))


def device_share(steps: Sequence[StepRecord], duration: float) -> float | None:
    """Share of the run that the device worked, at most: waiting for the host inside a launch counts as work.

    None where the executor did not tell.
    """
    seconds = [step.device_seconds for step in steps if step.device_seconds is not None]
    return min(1.0, sum(seconds) / duration) if seconds and duration > 0 else None

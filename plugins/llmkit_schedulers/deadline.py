"""Earliest deadline first, with admission control: what could only end too late is refused instead of run."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit import (
    ContinuousBatching,
    ContinuousBatchingSettings,
    DenialReason,
    RequestQueue,
    RequestStatus,
    RequestView,
    SchedulerSettings,
    SchedulingStep,
)

NEWEST = 0.1
"""How much the last step counts in the mean of step times."""


class DeadlineSettings(ContinuousBatchingSettings):
    """Options of the deadline scheduler."""

    implied_seconds: float = Field(60.0, gt=0.0, description="without a deadline a request ranks as if due so late")
    caution: float = Field(
        1.0, ge=0.0, le=100.0, description="predicted times count so often; 0: refuse the overdue only"
    )


class Deadline(ContinuousBatching):
    """Who is due first goes first; what cannot end in time is refused.

    When its turn comes, a request that never ran is refused if it would end after its deadline even if it started at
    once: predicted from its hint, or all it may produce, and the mean time of recent steps. Without that a queue that
    is too long would have everybody end a little too late. A request without a deadline is never refused. Who runs
    stays; whoever is due last gives way when blocks run out.
    """

    Settings: ClassVar[type[SchedulerSettings]] = DeadlineSettings

    def __init__(self, settings: SchedulerSettings) -> None:
        super().__init__(settings)
        assert isinstance(settings, DeadlineSettings)
        self._implied, self._caution = settings.implied_seconds, settings.caution
        self._step_seconds = self._planned_at = 0.0

    def rank(self, request: RequestView) -> tuple[float, float]:
        """Sort key, lowest first. It does not change while a request lives."""
        implied = request.arrival_time + self._implied
        return request.deadline if request.deadline is not None else implied, request.arrival_time

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        self._measure(queue, step.now)
        super().schedule(queue, step)

    def _measure(self, queue: RequestQueue, now: float) -> None:
        if queue.running:  # so what passed since the last call was a step
            seconds, known = now - self._planned_at, self._step_seconds
            self._step_seconds = known + NEWEST * (seconds - known) if known else seconds
        self._planned_at = now

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return sorted(waiting, key=self.rank)

    def order_running(self, running: Sequence[RequestView], now: float) -> Sequence[RequestView]:
        return sorted(running, key=self.rank)

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        return self.rank(started) <= self.rank(waiting)

    def admit(self, request: RequestView, step: SchedulingStep) -> bool:
        if request.deadline is None or request.status is not RequestStatus.WAITING:
            return True
        num_outputs = request.max_num_tokens - request.num_prompt_tokens
        num_outputs = min(request.length_hint or num_outputs, num_outputs)
        num_steps = num_outputs + request.num_prompt_tokens / self.settings.max_num_batched_tokens
        late = step.now + self._caution * num_steps * self._step_seconds - request.deadline
        if late > 0.0:
            step.reject(request, f"{DenialReason.TOO_LATE.value}: {late:.3g} s late if it started now")
        return late <= 0.0

"""Priority scheduling with ageing: urgent requests run first, and waiting makes a request more urgent."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit import ContinuousBatching, ContinuousBatchingSettings, RequestView, SchedulerSettings


class PrioritySettings(ContinuousBatchingSettings):
    """Options of the priority scheduler."""

    ageing_seconds: float = Field(10.0, gt=0.0, description="waiting this long is worth one level of priority")


class Priority(ContinuousBatching):
    """Lower `priority` first, then arrival; the least urgent is preempted, also to let a more urgent one in.

    A request's rank is `priority + arrival_time / ageing_seconds`: among waiting requests this orders exactly like
    `priority - waited / ageing_seconds`, but does not change with time. So every later arrival of any priority class
    ranks behind a request once it came `ageing_seconds` times the difference later: nobody starves.
    """

    Settings: ClassVar[type[SchedulerSettings]] = PrioritySettings

    def rank(self, request: RequestView) -> tuple[float, float]:
        """Sort key, lowest first."""
        assert isinstance(self.settings, PrioritySettings)
        return request.priority + request.arrival_time / self.settings.ageing_seconds, request.arrival_time

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return sorted(waiting, key=self.rank)

    def order_running(self, running: Sequence[RequestView], now: float) -> Sequence[RequestView]:
        return sorted(running, key=self.rank)

    def outranks(self, waiting: RequestView, running: RequestView) -> bool:
        return self.rank(waiting) < self.rank(running)

    def may_pass(self, started: RequestView, waiting: RequestView, now: float) -> bool:
        """Who came later, by as much as the levels between the two are worth."""
        assert isinstance(self.settings, PrioritySettings)
        levels = waiting.priority - started.priority
        return started.arrival_time - waiting.arrival_time <= levels * self.settings.ageing_seconds

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        """Ranks do not change, and the order of those who run only matters when somebody has to give way."""
        return not num_waiting

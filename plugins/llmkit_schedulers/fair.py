"""Fair shares for tenants: whoever had the least service goes first (virtual token counter, Sheng et al. 2024)."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field

from llmkit import (
    ContinuousBatching,
    ContinuousBatchingSettings,
    RequestQueue,
    RequestStatus,
    RequestView,
    SchedulerSettings,
    SchedulingStep,
)


class FairSettings(ContinuousBatchingSettings):
    """Options of the fair scheduler."""

    output_weight: float = Field(2.0, ge=1.0, le=100.0, description="an output token counts like so many prompt tokens")


class Fair(ContinuousBatching):
    """The tenant with the least service goes first; within a tenant it is first come, first served.

    Service is counted in tokens computed, recomputation included. A tenant is away while no request of it is left
    waiting, whatever runs; when it comes back it is lifted to the smallest counter of those that stayed, so absence
    saves nothing up. Who runs stays, and the latest admitted gives way when blocks run out: a victim chosen by
    counters, which running changes, would have two tenants evict each other in turn.
    """

    Settings: ClassVar[type[SchedulerSettings]] = FairSettings

    def __init__(self, settings: SchedulerSettings) -> None:
        super().__init__(settings)
        assert isinstance(settings, FairSettings)
        self._weight = settings.output_weight
        self._counters: dict[str, float] = {}
        self._charged: dict[RequestView, float] = {}
        self._left: set[str] = set()
        self._latest: set[str] = set()
        self._floor = 0.0

    def service(self, request: RequestView) -> float:
        """What `request` had so far, in prompt tokens."""
        return request.num_service_tokens + (self._weight - 1.0) * request.num_output_tokens

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        self._charge(queue)
        super().schedule(queue, step)
        self._left = self._left_waiting(queue)

    @staticmethod
    def _left_waiting(queue: RequestQueue) -> set[str]:
        """Tenants some of whose requests waited and did not start."""
        return {request.tenant for request in queue.waiting if request.status is not RequestStatus.RUNNING}

    def _charge(self, queue: RequestQueue) -> None:
        """Count what ran since the last step, lift tenants that came back, forget those that owe nothing."""
        for request, before in self._charged.items():
            self._counters[request.tenant] += self.service(request) - before
        self._charged = {request: self.service(request) for request in queue.running}
        waiting = {request.tenant for request in queue.waiting}
        stayed = waiting & self._left
        self._floor = max(self._floor, min((self._counters[tenant] for tenant in stayed or self._latest), default=0.0))
        self._latest = waiting or self._latest
        present = self._latest | {request.tenant for request in queue.running}
        kept = {t: count for t, count in self._counters.items() if t in present or count > self._floor}
        lifted = {t: max(kept.get(t, 0.0), self._floor) for t in waiting - stayed}
        self._counters = kept | lifted

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterator[RequestView]:
        queues: dict[str, deque[RequestView]] = {}
        for request in waiting:
            queues.setdefault(request.tenant, deque()).append(request)
        counters = dict(self._counters)
        while queues:
            tenant = min(queues, key=counters.__getitem__)
            request = queues[tenant].popleft()
            self._charged[request] = self.service(request)
            yield request
            self._floor = max(self._floor, self._counters[tenant])  # it starts: of all who waited it had the least
            counters[tenant] += request.num_tokens  # admitted, it counts at once: the others are next
            if not queues[tenant]:
                del queues[tenant]

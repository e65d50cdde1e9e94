"""A planner whose scheduler does exactly what the test says."""

from collections.abc import Callable
from typing import Any

import pytest

from llmkit.engine.planner import Planner
from llmkit.engine.swapping import HostPool
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import RequestQueue, Scheduler, SchedulingStep
from llmkit.testing.invariants import check_planner
from llmkit.types import Request, SamplingParams, StepPlan
from llmkit_caches.paged import PagedCache, PagedSettings

Script = Callable[[RequestQueue, SchedulingStep], None]


def run_all(queue: RequestQueue, step: SchedulingStep) -> None:
    """Run everybody, as far as they go."""
    for view in [*queue.running, *queue.waiting]:
        step.run(view, 1 << 30)


class Scripted(Scheduler):
    """Calls `script`."""

    script: Script

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        self.script(queue, step)


class Rig:
    """A planner over a small paged pool; `in_flight` holds the plans not landed, and everything is checked always.

    Nothing is reused unless `prefix` says so, or another `cache` is given.
    """

    def __init__(
        self,
        num_blocks: int = 8,
        block_size: int = 4,
        prefix: bool = False,
        cache: CacheAllocator | None = None,
        host: HostPool | None = None,
        **limits: int,
    ) -> None:
        self.scheduler = Scripted(Scripted.Settings(**limits))
        self.allocator = cache or PagedCache(PagedSettings(prefix=prefix), CacheSpec(num_blocks, block_size))
        self.planner = Planner(self.scheduler, self.allocator, host)
        self.in_flight: list[StepPlan] = []
        self.rejected: dict[Request, str] = {}

    def add(self, request_id: str, num_prompt: int = 4, max_tokens: int = 8, **fields: Any) -> Request:
        request = Request(request_id, list(range(num_prompt)), SamplingParams(max_tokens=max_tokens), **fields)
        self.planner.add(request)
        return request

    def plan(self, script: Script = run_all) -> StepPlan | None:
        """Plan one step and leave it in flight."""
        self.scheduler.script = script
        try:
            plan, self.rejected = self.planner.plan(0.0)
            if plan is not None:
                self.in_flight.append(plan)
        finally:
            check_planner(self.planner, self.in_flight)
        return plan

    def planned(self, script: Script = run_all) -> StepPlan:
        plan = self.plan(script)
        assert plan is not None
        return plan

    def land(self) -> list[str | None]:
        """Land the oldest step with a dummy token for each row that samples; ids of the rows that still counted."""
        plan = self.in_flight.pop(0)
        landed = self.planner.land(plan)
        for row, request in zip(plan.scheduled, landed, strict=True):
            if request is not None and row.samples:
                request.token_ids.append(0)
                request.num_tokens += 1
        check_planner(self.planner, self.in_flight)
        return [request and request.request_id for request in landed]

    @property
    def num_free_blocks(self) -> int:
        return self.allocator.stats().num_free_blocks


@pytest.fixture
def make_rig() -> type[Rig]:
    return Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()

"""Host cost of a step: scheduling and allocation alone, then the whole engine around an executor that does nothing.

The limits are the project's: 100 us a step at 64 running requests, 400 us at 256, in steady decode.
"""

from dataclasses import dataclass
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import Scheduler
from llmkit.types import Request, SamplingParams, StepPlan, StepResult
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.static import Static

BLOCK_SIZE, NUM_BLOCKS_EACH, MAX_TOKENS = 16, 128, 1500
LIMIT_US = {64: 100.0, 256: 400.0}


@dataclass
class Done:
    """A step that has already run."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class Instant:
    """Takes no time: every row that samples gets token 1."""

    def launch(self, plan: StepPlan) -> Done:
        return Done(StepResult(plan.step_id, [1 if row.samples else -1 for row in plan.scheduled]))


def build_planner(scheduler: type[Scheduler], cache: type[CacheAllocator], num_requests: int) -> Planner:
    settings = scheduler.Settings(max_num_seqs=num_requests, max_num_batched_tokens=1 << 16)
    spec = CacheSpec(num_requests * NUM_BLOCKS_EACH, BLOCK_SIZE)
    return Planner(scheduler(settings), cache(cache.Settings(), spec))


def requests_of(num_requests: int) -> list[Request]:
    """Prompt lengths differ, so that blocks fill up at different steps."""
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    return [Request(str(n), [1] * (100 + n % 97), params, n / 100, n % 3) for n in range(num_requests)]


class Decoding:
    """All requests run; every step takes one token of each."""

    def __init__(self, planner: Planner, num_requests: int) -> None:
        self.planner = planner
        self.requests = requests_of(num_requests)
        for request in self.requests:
            planner.add(request)
        self.step()

    def step(self) -> None:
        """What is measured: plan a step and land it."""
        plan, _ = self.planner.plan(0.0)
        assert plan is not None
        self.planner.land(plan)

    def feed(self) -> None:
        """Not measured: a new token for everybody."""
        for request in self.requests:
            request.token_ids.append(1)
            request.num_tokens += 1


def check_limit(benchmark: BenchmarkFixture, limit_us: float) -> None:
    """Hold the median against the limit; nothing was measured under --benchmark-disable."""
    benchmark.extra_info["limit_us"] = limit_us
    if benchmark.enabled:
        median_us = benchmark.stats.stats.median * 1e6
        assert median_us <= limit_us, f"a step takes {median_us:.0f} us, the limit is {limit_us:.0f}"


@pytest.mark.parametrize("num_requests", LIMIT_US)
@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
@pytest.mark.parametrize("scheduler", [Continuous, Priority, Static])
def test_planning_a_decode_step(benchmark: BenchmarkFixture, scheduler: Any, cache: Any, num_requests: int) -> None:
    decoding = Decoding(build_planner(scheduler, cache, num_requests), num_requests)
    benchmark.pedantic(decoding.step, setup=decoding.feed, rounds=500, warmup_rounds=30)
    assert decoding.planner.num_running == num_requests
    check_limit(benchmark, LIMIT_US[num_requests])


@pytest.mark.parametrize("num_requests", LIMIT_US)
def test_a_whole_engine_step_around_an_instant_executor(benchmark: BenchmarkFixture, num_requests: int) -> None:
    """Stop checks, outputs and the clock included; the model is not."""
    planner = build_planner(Continuous, PagedCache, num_requests)
    engine = Engine(planner, Instant(), EngineLimits(100, NUM_BLOCKS_EACH * BLOCK_SIZE))
    for request in requests_of(num_requests):
        engine.add(request)
    engine.step()
    outputs = benchmark.pedantic(engine.step, rounds=500, warmup_rounds=30)
    assert len(outputs) == num_requests


@pytest.mark.parametrize("num_requests", LIMIT_US)
def test_admitting_a_batch(benchmark: BenchmarkFixture, num_requests: int) -> None:
    """The first step: every request is admitted and its whole prompt scheduled."""

    def setup() -> tuple[tuple[Planner], dict[str, Any]]:
        planner = build_planner(Continuous, PagedCache, num_requests)
        for request in requests_of(num_requests):
            planner.add(request)
        return (planner,), {}

    plan, _ = benchmark.pedantic(lambda planner: planner.plan(0.0), setup=setup, rounds=50)
    assert len(plan.admissions) == num_requests

"""Host cost of a step: the whole engine around an executor that does nothing.

The limits are the project's: 50 us a step at 64 running requests, 100 us at 256, in steady decode. A scheduler that is
asked for every step costs more, and so does reporting every token. `host_time.py` has the same by phases.
"""

from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.host_time import Instant
from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.scheduler import Scheduler
from llmkit.types import Request, SamplingParams
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.static import Static

BLOCK_SIZE, NUM_BLOCKS_EACH, MAX_TOKENS = 16, 128, 1500
LIMIT_US = {64: 50.0, 256: 100.0}


def build_planner(scheduler: type[Scheduler], cache: type[CacheAllocator], num_requests: int) -> Planner:
    settings = scheduler.Settings(max_num_seqs=num_requests, max_num_batched_tokens=1 << 16)
    spec = CacheSpec(num_requests * NUM_BLOCKS_EACH, BLOCK_SIZE)
    return Planner(scheduler(settings), cache(cache.Settings(), spec))


def requests_of(num_requests: int) -> list[Request]:
    """Prompt lengths differ, so that blocks fill up at different steps."""
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    return [Request(str(n), [1] * (100 + n % 97), params, n / 100, n % 3) for n in range(num_requests)]


class Asked(Continuous):
    """Is asked for every step."""

    def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
        return False


def decoding(scheduler: type[Scheduler], cache: type[CacheAllocator], num_requests: int, streams: bool) -> Engine:
    """An engine whose requests all decode."""
    planner = build_planner(scheduler, cache, num_requests)
    engine = Engine(planner, Instant(), EngineLimits(100, NUM_BLOCKS_EACH * BLOCK_SIZE))
    for request in requests_of(num_requests):
        engine.add(request, Progress(request, frozenset(), streams=streams))
    engine.step()
    return engine


def check_limit(benchmark: BenchmarkFixture, limit_us: float) -> None:
    """Hold the median against the limit; nothing was measured under --benchmark-disable."""
    benchmark.extra_info["limit_us"] = limit_us
    if benchmark.enabled:
        median_us = benchmark.stats.stats.median * 1e6
        assert median_us <= limit_us, f"a step takes {median_us:.0f} us, the limit is {limit_us:.0f}"


@pytest.mark.parametrize("num_requests", LIMIT_US)
@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
@pytest.mark.parametrize("scheduler", [Continuous, Priority, Static])
def test_a_decode_step(benchmark: BenchmarkFixture, scheduler: Any, cache: Any, num_requests: int) -> None:
    engine = decoding(scheduler, cache, num_requests, streams=False)
    outputs = benchmark.pedantic(engine.step, rounds=500, warmup_rounds=30)
    assert not outputs and engine.planner.num_running == num_requests
    check_limit(benchmark, LIMIT_US[num_requests])


@pytest.mark.parametrize("num_requests", LIMIT_US)
@pytest.mark.parametrize(("scheduler", "streams"), [(Continuous, True), (Asked, False), (Asked, True)])
def test_a_decode_step_that_costs_more(
    benchmark: BenchmarkFixture, scheduler: Any, streams: bool, num_requests: int
) -> None:
    engine = decoding(scheduler, PagedCache, num_requests, streams)
    outputs = benchmark.pedantic(engine.step, rounds=500, warmup_rounds=30)
    assert len(outputs) == (num_requests if streams else 0)


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

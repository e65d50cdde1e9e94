"""The kit, applied to every built-in scheduler on every built-in cache, at every depth."""

import pytest

from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.scheduler import Scheduler
from llmkit.testing import Chaos, check_scheduler
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from llmkit_schedulers.deadline import Deadline
from llmkit_schedulers.fair import Fair
from llmkit_schedulers.prefix_aware import PrefixAware
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.sequential import Sequential
from llmkit_schedulers.sjf import ShortestJobFirst
from llmkit_schedulers.static import Static

SCHEDULERS = [Continuous, Deadline, Fair, PrefixAware, Priority, Sequential, ShortestJobFirst, Static]
# Options under which a walk of some forty seconds goes through all a scheduler may do.
OPTIONS: dict[type[Scheduler], dict[str, float]] = {
    PrefixAware: {"max_wait_seconds": 10.0},
    Priority: {"ageing_seconds": 5.0},
    ShortestJobFirst: {"seconds_per_token": 1.0},
}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_combination_conforms(scheduler: type[Scheduler], cache: type[CacheAllocator], depth: int) -> None:
    options = OPTIONS.get(scheduler, {})
    coverage = check_scheduler(scheduler, options=options, caches=[cache], depths=[depth], seeds=range(30))
    assert coverage.num_walks == 30 and coverage.num_steps > 1000 and coverage.num_tokens > 700, coverage
    assert coverage.num_aborts > 15 and coverage.num_errors > 5, coverage
    assert coverage.num_late > 5 if scheduler is Deadline else not coverage.num_late, coverage
    if scheduler is not Sequential and cache is PagedCache:
        assert coverage.num_preemptions > 20, coverage


@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
def test_chaos_cannot_corrupt_anything(cache: type[CacheAllocator]) -> None:
    coverage = check_scheduler(Chaos, caches=[cache], seeds=range(10), is_strict=False)
    assert coverage.num_preemptions > 1000 and coverage.num_tokens > 200, coverage


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_conforms_at_length(scheduler: type[Scheduler]) -> None:
    coverage = check_scheduler(scheduler, caches=[PagedCache, ContiguousCache], seeds=range(1000, 1800))
    assert coverage.num_steps > 300_000, coverage

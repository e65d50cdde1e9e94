"""The kit, applied to every built-in cache: alone, under engines, and as a hypothesis state machine."""

from unittest import TestCase

import pytest
from hypothesis import settings

from llmkit.interfaces.cache import CacheAllocator
from llmkit.testing import check_cache
from llmkit.testing.caches import audit
from llmkit.testing.machine import cache_machine
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache

CACHES = [PagedCache, RadixCache, ContiguousCache]


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_conforms(cache: type[CacheAllocator]) -> None:
    coverage = check_cache(cache, seeds=range(8))
    assert coverage.num_steps > 2000 and coverage.num_preemptions > 500, coverage


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_keeps_its_promises_alone(cache: type[CacheAllocator]) -> None:
    num_refusals = sum(audit(cache, seed, {}).num_refusals for seed in range(200))
    assert num_refusals > 1000


class PagedMachine(cache_machine(PagedCache).TestCase, TestCase):  # type: ignore[misc]
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None)


class RadixMachine(cache_machine(RadixCache).TestCase, TestCase):  # type: ignore[misc]
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None)


class ContiguousMachine(cache_machine(ContiguousCache).TestCase, TestCase):  # type: ignore[misc]
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None)

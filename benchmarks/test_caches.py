"""Host cost of the allocators alone: growth, turnover, reuse, and the check that tests run after every step."""

from itertools import count
from random import Random
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.types import Request, SamplingParams
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache

CACHES = [PagedCache, RadixCache, ContiguousCache]
SHARING = [PagedCache, RadixCache]
BLOCK_SIZE, NUM_REQUESTS, NUM_BLOCKS_EACH = 16, 256, 64
LENGTH = BLOCK_SIZE * NUM_BLOCKS_EACH


def build(cache: type[CacheAllocator]) -> tuple[Any, list[Request]]:
    """An empty pool and requests that fill it exactly."""
    allocator = cache(cache.Settings(), CacheSpec(NUM_REQUESTS * NUM_BLOCKS_EACH, BLOCK_SIZE))
    params = SamplingParams(max_tokens=1)
    return allocator, [Request(str(n), [1], params, max_num_tokens=LENGTH) for n in range(NUM_REQUESTS)]


@pytest.mark.parametrize("cache", CACHES)
def test_growing_by_a_block_each(benchmark: BenchmarkFixture, cache: type[CacheAllocator]) -> None:
    """256 requests take their next block: the worst decode step."""
    allocator, requests = build(cache)
    reach = iter(range(BLOCK_SIZE, LENGTH + 1, BLOCK_SIZE))

    def grow(upto: int) -> bool:
        return sum(allocator.allocate(request, upto) for request in requests) == NUM_REQUESTS

    assert benchmark.pedantic(grow, setup=lambda: ((next(reach),), {}), rounds=NUM_BLOCKS_EACH - 2, warmup_rounds=1)


@pytest.mark.parametrize("cache", CACHES)
def test_turnover_of_a_full_pool(benchmark: BenchmarkFixture, cache: type[CacheAllocator]) -> None:
    """A request ends and another takes its place, in random order."""
    allocator, requests = build(cache)
    for request in requests:
        assert allocator.allocate(request, LENGTH)
    random = Random(0)

    def turn_over(request: Request) -> bool:
        allocator.free(request)
        return bool(allocator.allocate(request, LENGTH))

    assert benchmark.pedantic(turn_over, setup=lambda: ((random.choice(requests),), {}), rounds=2000, warmup_rounds=20)


@pytest.mark.parametrize("cache", CACHES)
def test_finding_room_between_many_holes(benchmark: BenchmarkFixture, cache: type[CacheAllocator]) -> None:
    """Every other request is gone: as fragmented as a pool gets."""
    allocator, requests = build(cache)
    for request in requests:
        allocator.allocate(request, LENGTH)
    for request in requests[::2]:
        allocator.free(request)

    def come_and_go() -> bool:
        is_granted = allocator.allocate(requests[0], LENGTH)
        allocator.free(requests[0])
        return bool(is_granted)

    assert benchmark.pedantic(come_and_go, rounds=1000, warmup_rounds=10)


@pytest.mark.parametrize("cache", CACHES)
def test_checking_the_books(benchmark: BenchmarkFixture, cache: type[CacheAllocator]) -> None:
    """What a debugging run pays for calling `check` in every step."""
    allocator, requests = build(cache)
    for request in requests:
        allocator.allocate(request, LENGTH)
    benchmark.pedantic(allocator.check, rounds=20)
    assert allocator.stats().num_free_blocks == 0


@pytest.mark.parametrize("cache", SHARING)
def test_publishing_a_block_each(benchmark: BenchmarkFixture, cache: type[CacheAllocator]) -> None:
    """256 requests fill a block in the same step, of tokens that nobody else has."""
    allocator, requests = build(cache)
    for number, request in enumerate(requests):
        request.token_ids = [number, *range(1, LENGTH)]
        assert allocator.allocate(request, LENGTH)
    reach = iter(range(BLOCK_SIZE, LENGTH + 1, BLOCK_SIZE))

    def commit(upto: int) -> None:
        for request in requests:
            allocator.commit(request, upto)

    benchmark.pedantic(commit, setup=lambda: ((next(reach),), {}), rounds=NUM_BLOCKS_EACH - 2, warmup_rounds=1)


@pytest.mark.parametrize("cache", SHARING)
def test_finding_a_prompt_of_1024_tokens(benchmark: BenchmarkFixture, cache: type[CacheAllocator]) -> None:
    """It is cached but for its last block. Another request asks each time, so nothing is remembered."""
    allocator, _ = build(cache)
    params, prompt = SamplingParams(max_tokens=1), list(range(LENGTH))
    first = Request("first", prompt, params)
    assert allocator.allocate(first, LENGTH)
    allocator.commit(first, LENGTH)
    names = (Request(str(number), list(prompt), params) for number in count())
    found = benchmark.pedantic(allocator.match, setup=lambda: ((next(names),), {}), rounds=1000, warmup_rounds=10)
    assert found == LENGTH - BLOCK_SIZE

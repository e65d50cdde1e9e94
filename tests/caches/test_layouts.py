"""Where the two built-in caches differ: in which blocks they hand out, and when."""

from typing import Any

import pytest

from llmkit.interfaces.cache import CacheAllocator, CacheSpec, CacheStats
from llmkit.types import Request, SamplingParams
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache


def build(cache: type[CacheAllocator], num_blocks: int = 8, block_size: int = 4) -> Any:
    return cache(cache.Settings(), CacheSpec(num_blocks, block_size))


def request(name: str, max_num_tokens: int) -> Request:
    return Request(name, [1], SamplingParams(), max_num_tokens=max_num_tokens)


@pytest.mark.parametrize(("upto", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (32, 8)])
def test_paged_takes_the_blocks_it_needs_now(upto: int, num_blocks: int) -> None:
    cache, one = build(PagedCache), request("a", 32)
    assert cache.allocate(one, upto) and len(cache.block_table(one)) == num_blocks
    assert cache.stats() == CacheStats(num_blocks, 0, 8 - num_blocks)


def test_paged_uses_any_free_block() -> None:
    cache, requests = build(PagedCache), [request(name, 32) for name in "abcd"]
    for one in requests:
        assert cache.allocate(one, 8)
    cache.free(requests[0])
    cache.free(requests[2])
    assert cache.allocate(request("e", 16), 16), "four scattered blocks serve as well as four in a row"


def test_paged_gives_back_the_tail() -> None:
    cache, one = build(PagedCache), request("a", 32)
    cache.allocate(one, 20)
    table = list(cache.block_table(one))
    cache.truncate(one, 9)
    assert list(cache.block_table(one)) == table[:3] and cache.stats().num_free_blocks == 5
    cache.truncate(one, 0)
    assert cache.stats().num_free_blocks == 8


def test_contiguous_reserves_one_run_for_the_full_length() -> None:
    cache, one = build(ContiguousCache), request("a", 17)
    assert cache.allocate(one, 1)
    assert list(cache.block_table(one)) == [0, 1, 2, 3, 4] and cache.stats() == CacheStats(5, 0, 3)
    assert cache.allocate(one, 17) and not cache.allocate(one, 21), "growth stays within the reservation"
    cache.truncate(one, 1)
    assert cache.stats() == CacheStats(5, 0, 3)


def test_contiguous_needs_its_blocks_in_a_row() -> None:
    cache, requests = build(ContiguousCache), [request(name, 8) for name in "abcd"]
    for one in requests:
        assert cache.allocate(one, 1)
    cache.free(requests[0])
    cache.free(requests[2])
    wide = request("e", 16)
    assert not cache.allocate(wide, 1), "four blocks are free, but not in a row"
    cache.free(requests[1])
    assert cache.allocate(wide, 1) and list(cache.block_table(wide)) == [0, 1, 2, 3]


@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
def test_the_census_names_the_owners(cache: type[CacheAllocator]) -> None:
    allocator, one, two = build(cache), request("a", 8), request("b", 4)
    allocator.allocate(one, 8), allocator.allocate(two, 4)
    assert sorted(allocator.census().values()) == [("a",), ("a",), ("b",)]
    assert all(allocator.census()[block] == ("a",) for block in allocator.block_table(one))


def test_a_pool_counts_its_slots() -> None:
    assert CacheSpec(8, 4).num_slots == 32


@pytest.mark.parametrize(
    "breakage",
    [
        lambda cache: cache._free.append(cache._free[0]),
        lambda cache: cache._free.pop(),
        lambda cache: cache._tables["a"].pop(),
        lambda cache: cache._tables.update(b=list(cache._tables["a"])),
        lambda cache: cache._free.append(cache._tables["a"].pop()),
    ],
)
def test_paged_notices_its_own_broken_books(breakage: Any) -> None:
    cache = build(PagedCache)
    cache.allocate(request("a", 8), 8)
    cache.check()
    breakage(cache)
    with pytest.raises(AssertionError):
        cache.check()


@pytest.mark.parametrize(
    "breakage",
    [
        lambda cache: cache._holes.clear(),
        lambda cache: cache._holes.append((0, 1)),
        lambda cache: cache._runs.update(b=range(2)),
        lambda cache: cache._runs.clear(),
    ],
)
def test_contiguous_notices_its_own_broken_books(breakage: Any) -> None:
    cache = build(ContiguousCache)
    cache.allocate(request("a", 8), 8)
    cache.check()
    breakage(cache)
    with pytest.raises(AssertionError):
        cache.check()

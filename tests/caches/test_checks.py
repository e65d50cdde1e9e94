"""`check` bites: each way in which the books of a cache that reuses prefixes can be wrong is noticed by itself."""

from collections.abc import Callable
from typing import Any

import pytest

from llmkit.interfaces.cache import CacheSpec
from llmkit.testing.schedulers import build_cache
from llmkit.types import Request, SamplingParams
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache


def lived_in(kind: Any) -> Any:
    """Ten blocks of two: `a` runs in five, two more are cached, the other three are free."""
    cache = build_cache(kind, CacheSpec(10, 2), {})
    for name, tokens in (("b", [1, 1, 2, 2, 3]), ("a", [*range(9)])):
        one = Request(name, tokens, SamplingParams(max_tokens=1))
        assert cache.allocate(one, len(tokens))
        cache.commit(one, len(tokens))
        if name == "b":
            cache.free(one)
    cache.check()
    return cache


def cached(cache: Any, at: int) -> Any:
    """What `a` has published in its block of that number."""
    return cache._index._of_block[cache._tables["a"][at]]


def idle(cache: Any) -> Any:
    """What can be evicted."""
    return next(one for one in cache._index._of_block.values() if one.ticket)


SLIPS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda c: c._free.append(c._free[0]), "on the free list twice|owned blocks"),
    (lambda c: c._free.pop(), "owned blocks"),
    (lambda c: c._free.__setitem__(0, c._tables["a"][0]), "an owned block is on the free list"),
    (lambda c: c._ref_counts.__setitem__(c._tables["a"][0], 2), "blocks are counted"),
    (lambda c: c._tables["a"].__setitem__(0, -1), "released of"),
    (lambda c: c._tables["a"].reverse(), "can be found"),
    (lambda c: c._tables.__setitem__("b", []), "keeps none of"),
    (lambda c: c._num_published.__setitem__("b", 0), "gone count as published"),
    (lambda c: c._num_released.__setitem__("b", 0), "gone count as released"),
    (lambda c: c._num_published.__setitem__("a", 5), "not all of 5 blocks can be found"),
    (lambda c: c._num_published.__setitem__("a", 3), "blocks beyond 3 can be found"),
    (lambda c: cached(c, 1).blocks.reverse() or cached(c, 1).blocks.append(0), "stands for"),
    (lambda c: cached(c, 1).blocks.append(idle(c).blocks[0]), "stands for"),
    (lambda c: setattr(c._index, "num_idle", c._index.num_idle + 1), "owned blocks"),
    (lambda c: setattr(idle(c), "is_gone", True), "an evicted block can still be found"),
    (lambda c: setattr(idle(c), "ticket", 0), "not what waits for it|what stands last"),
    (lambda c: c._index._queue.clear(), "what can be evicted is not what waits for it"),
    (lambda c: setattr(cached(c, 1), "is_idle", True), "unused blocks are miscounted|evicted is not"),
    (lambda c: (setattr(idle(c), "is_idle", False), c._index._queue.clear()), "miscounted|evicted is not"),
]


@pytest.mark.parametrize("kind", [PagedCache, RadixCache])
@pytest.mark.parametrize("number", range(len(SLIPS)))
def test_a_slip_in_the_books_is_noticed(number: int, kind: Any) -> None:
    slip, message = SLIPS[number]
    cache = lived_in(kind)
    slip(cache)
    with pytest.raises(AssertionError, match=message):
        cache.check()


def test_blocks_filed_or_counted_wrongly_are_noticed() -> None:
    """What only the table of hashes can get wrong."""
    for name, value in (("num_children", 7), ("key", 1), ("token_ids", (1,)), ("parent", None)):
        cache = lived_in(PagedCache)
        setattr(cached(cache, 1), name, value)
        with pytest.raises(AssertionError):
            cache.check()
    cache = lived_in(PagedCache)
    cache._index._roots.clear()
    with pytest.raises(AssertionError, match="a tenant's root is missing"):
        cache.check()

"""Who makes room first, policy by policy; and what no policy can do."""

from typing import get_args

import pytest
from pydantic import ValidationError

from llmkit.interfaces.cache import CacheSpec
from llmkit.testing.schedulers import build_cache
from llmkit.types import Request, SamplingParams
from llmkit_caches.eviction import POLICIES
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from llmkit_caches.sharing import SharingCache


class Pool:
    """A pool of one-token blocks; a request is a word, whose letters are its blocks."""

    def __init__(self, num_blocks: int, eviction: str, cache: type[SharingCache] = PagedCache) -> None:
        self.cache = build_cache(cache, CacheSpec(num_blocks, 1), {"eviction": eviction})

    def use(self, *words: str) -> None:
        """Requests come, are computed and leave, one after the other."""
        for word in words:
            request = Request(word, [ord(letter) for letter in word], SamplingParams())
            assert self.cache.allocate(request, len(word))
            self.cache.commit(request, len(word))
            self.cache.free(request)
            self.cache.check()

    def knows(self, word: str) -> int:
        """How many letters of `word` are cached."""
        return self.cache.match(Request("?", [*map(ord, word), 0], SamplingParams()))


@pytest.mark.parametrize("cache", [PagedCache, RadixCache])
@pytest.mark.parametrize("num_wanted", [0, 1, 2, 3])
@pytest.mark.parametrize(("eviction", "order"), [("lru", "bca"), ("lfu", "cba"), ("fifo", "abc")])
def test_each_policy_has_its_order(eviction: str, order: str, num_wanted: int, cache: type[SharingCache]) -> None:
    pool = Pool(4, eviction, cache)
    pool.use("a", "b", "c", "b", "b", "c", "a", "a", "a")  # the fourth block is for whoever runs
    pool.use("1234"[: 1 + num_wanted])
    assert [letter for letter in order if not pool.knows(letter)] == list(order[:num_wanted])


@pytest.mark.parametrize("cache", [PagedCache, RadixCache])
@pytest.mark.parametrize("num_wanted", range(6))
@pytest.mark.parametrize("eviction", POLICIES)
def test_the_end_of_a_sequence_goes_before_its_beginning(
    eviction: str, num_wanted: int, cache: type[SharingCache]
) -> None:
    pool = Pool(6, eviction, cache)
    pool.use("abcde")
    pool.use("123456"[: 1 + num_wanted])
    assert pool.knows("abcde") == 5 - num_wanted


@pytest.mark.parametrize("eviction", POLICIES)
def test_what_is_used_is_never_evicted(eviction: str) -> None:
    pool = Pool(6, eviction)
    pool.use("abc")
    user = Request("user", [*map(ord, "abc"), 0], SamplingParams())
    assert pool.cache.allocate(user, 4) and pool.cache.stats().num_cached_blocks == 0
    table = list(pool.cache.block_table(user))
    pool.use("12", "34", "56")
    assert pool.knows("abc") == 3 and pool.cache.block_table(user) == table
    assert not pool.cache.allocate(Request("late", [1, 2, 3], SamplingParams()), 3)


@pytest.mark.parametrize("cache", [PagedCache, RadixCache])
def test_every_policy_can_be_chosen_and_no_other(cache: type[SharingCache]) -> None:
    options = get_args(cache.Settings.model_fields["eviction"].annotation)
    assert options == tuple(POLICIES)
    with pytest.raises(ValidationError):
        cache.Settings.model_validate({"eviction": "mru"})

"""Forks of the caches that share blocks: who holds what, what is copied, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.interfaces.cache import CacheSpec, CacheStats
from llmkit.testing.caches import audit
from llmkit.testing.schedulers import build_cache
from llmkit.types import BlockCopy, Request, SamplingParams
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from llmkit_caches.sharing import RELEASED, SharingCache

TWENTY = list(range(20))
KINDS: list[tuple[type[SharingCache], dict[str, Any]]] = [
    (PagedCache, {}),
    (PagedCache, {"prefix": False}),
    (RadixCache, {}),
]


@pytest.fixture(params=KINDS, ids=["paged", "paged without prefixes", "radix"])
def build(request: pytest.FixtureRequest) -> Any:
    """Builds a cache that forks, in blocks of four tokens."""
    kind, options = request.param
    return lambda num_blocks=16, window=None: build_cache(kind, CacheSpec(num_blocks, 4, window), options)


def computed(cache: SharingCache, name: str, num_tokens: int) -> Request:
    """A request whose tokens all have KV."""
    one = Request(name, TWENTY[:num_tokens], SamplingParams())
    assert cache.allocate(one, num_tokens)
    cache.commit(one, num_tokens)
    return one


def newcomer(name: str = "b", num_tokens: int = 20) -> Request:
    return Request(name, TWENTY[:num_tokens], SamplingParams())


def test_full_blocks_are_shared_and_the_rest_is_copied(build: Any) -> None:
    cache = build()
    one, two = computed(cache, "a", 11), newcomer(num_tokens=11)
    copies = cache.fork(two, one, 10, 11)
    cache.check()
    ours, theirs = list(cache.block_table(two)), list(cache.block_table(one))
    assert ours[:2] == theirs[:2] and ours[2] != theirs[2] and copies == (BlockCopy(theirs[2], ours[2], 2),)
    assert cache.stats() == CacheStats(4, 0, 12) and cache.census()[ours[0]] == ("a", "b")
    assert cache.census()[ours[2]] == ("b",)


@pytest.mark.parametrize(
    ("num_tokens", "upto", "num_own", "num_copies"), [(8, 9, 1, 0), (8, 13, 2, 0), (7, 8, 1, 1), (2, 9, 3, 1)]
)
def test_room_for_more_is_reserved_at_once(
    build: Any, num_tokens: int, upto: int, num_own: int, num_copies: int
) -> None:
    cache = build()
    one, two = computed(cache, "a", 11), newcomer()
    assert len(cache.fork(two, one, num_tokens, upto)) == num_copies
    cache.check()
    assert len({*cache.block_table(two)} - {*cache.block_table(one)}) == num_own
    assert len(cache.block_table(two)) == -(-upto // 4)
    assert cache.allocate(two, 20) and len(cache.block_table(two)) == 5


def test_all_or_nothing(build: Any) -> None:
    cache = build(num_blocks=4)
    one, two = computed(cache, "a", 11), newcomer()
    before = cache.stats(), cache.census()
    assert cache.fork(two, one, 10, 13) is None
    assert (cache.stats(), cache.census()) == before and not cache.block_table(two)
    cache.check()
    assert cache.fork(two, one, 10, 12) is not None


@pytest.mark.parametrize("parent_first", [True, False])
def test_shared_blocks_stay_until_the_last_has_gone(build: Any, parent_first: bool) -> None:
    cache = build()
    one, two = computed(cache, "a", 11), newcomer()
    cache.fork(two, one, 10, 11)
    three = newcomer("c")
    cache.fork(three, one, 9, 10)
    for request, num_used in zip([one, two, three] if parent_first else [three, two, one], (4, 3, 0), strict=True):
        cache.free(request)
        cache.check()
        assert cache.stats().num_used_blocks == num_used


def test_a_fork_publishes_what_it_computes_itself(build: Any) -> None:
    cache = build()
    one, two = computed(cache, "a", 11), newcomer()
    cache.fork(two, one, 10, 20)
    cache.commit(two, 20), cache.commit(one, 11)
    cache.check()
    cache.free(one), cache.free(two)
    cache.check()
    assert cache.match(newcomer("c", 20)) == (16 if cache.reuses_prefixes else 0)


def test_blocks_that_were_never_published_are_before_they_are_shared(build: Any, monkeypatch: Any) -> None:
    """A commit that failed harms nobody; without this both would publish them."""
    cache = build()
    one, two = newcomer("a", 11), newcomer()
    assert cache.allocate(one, 11)
    cache.fork(two, one, 10, 20)
    cache.check()
    cache.commit(two, 20), cache.commit(one, 11)
    cache.check()
    cache.free(two), cache.free(one)
    cache.check()
    assert not cache.stats().num_used_blocks


def test_truncating_and_growing_leave_the_other_alone(build: Any) -> None:
    cache = build()
    one, two = computed(cache, "a", 16), newcomer()
    cache.fork(two, one, 15, 16)
    table = list(cache.block_table(one))
    cache.truncate(two, 5)
    cache.check()
    assert len(cache.block_table(two)) == 2 and list(cache.block_table(one)) == table
    assert cache.allocate(two, 20) and not {*cache.block_table(two)[2:]} & {*table}
    cache.check()


def test_with_a_window_only_what_is_seen_is_shared(build: Any) -> None:
    cache = build(window=6)
    one, two = computed(cache, "a", 18), newcomer(num_tokens=18)
    assert cache.num_released_blocks(one) == 3
    copies = cache.fork(two, one, 17, 18)
    cache.check()
    theirs, ours = list(cache.block_table(one)), list(cache.block_table(two))
    assert cache.num_released_blocks(two) == 3 and ours[:4] == [RELEASED] * 3 + theirs[3:4]
    assert copies == (BlockCopy(theirs[4], ours[4], 1),)
    cache.commit(two, 18)
    cache.check()


def test_a_contiguous_run_has_one_owner() -> None:
    cache = build_cache(ContiguousCache, CacheSpec(16, 4), {})
    one = newcomer("a")
    assert not cache.forks and cache.allocate(one, 11)
    with pytest.raises(NotImplementedError, match="ContiguousCache does not fork"):
        cache.fork(newcomer(), one, 10, 11)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_audit_forks(kind: type[SharingCache], options: dict[str, Any]) -> None:
    ledgers = [audit(kind, seed, options, has_window=seed % 2 > 0) for seed in range(60)]
    assert sum(ledger.num_forks for ledger in ledgers) > 50

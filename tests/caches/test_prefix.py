"""Prefix caching of the paged cache: what is found again, what is not, and what it costs to look."""

from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import ValidationError

from llmkit.interfaces.cache import CacheSpec, CacheStats
from llmkit.testing import check_cache
from llmkit.testing.schedulers import build_cache
from llmkit.types import Request, SamplingParams
from llmkit_caches.paged import PagedCache, PagedSettings
from llmkit_caches.radix import RadixCache
from llmkit_caches.sharing import SharingCache

Tokens = list[int]


class EightBits(PagedCache):
    """Hashes collide often."""

    hash_function = staticmethod(lambda parent, token_ids: hash((parent, token_ids)) & 0xFF)


class Constant(PagedCache):
    """Hashes always collide."""

    hash_function = staticmethod(lambda parent, token_ids: 0)


class Counting(PagedCache):
    """Counts the blocks that are hashed."""

    num_hashed = 0

    @staticmethod
    def hash_function(parent: int, token_ids: tuple[int, ...]) -> int:
        Counting.num_hashed += 1
        return hash((parent, token_ids))


def build(cache: type[SharingCache], num_blocks: int = 16, **options: Any) -> Any:
    """Blocks of four tokens."""
    return build_cache(cache, CacheSpec(num_blocks, 4), options)


ALL = [PagedCache, EightBits, Constant, RadixCache]


@pytest.fixture(params=[PagedCache, RadixCache])
def kind(request: pytest.FixtureRequest) -> type[SharingCache]:
    """The caches that reuse prefixes."""
    cache: type[SharingCache] = request.param
    return cache


def request(name: str, tokens: Tokens, tenant: str = "", **params: Any) -> Request:
    return Request(name, list(tokens), SamplingParams(**params), tenant=tenant)


def compute(cache: SharingCache, one: Request) -> Request:
    """Reserve and compute all tokens of `one`."""
    assert cache.allocate(one, one.num_tokens)
    cache.commit(one, one.num_tokens)
    cache.check()
    return one


def leave(cache: SharingCache, *requests: Request) -> None:
    for one in requests:
        cache.free(one)
    cache.check()


def matched(cache: SharingCache, tokens: Tokens, tenant: str = "") -> int:
    """What a newcomer with these tokens would find."""
    return cache.match(request("newcomer", tokens, tenant))


TEN, TWENTY = list(range(10)), list(range(20))


def test_full_blocks_are_found_once_they_are_committed_and_not_before(kind: type[SharingCache]) -> None:
    cache, one = build(kind), request("a", TEN)
    assert cache.allocate(one, 10) and matched(cache, TWENTY) == 0
    for num_computed, num_found in ((3, 0), (4, 4), (7, 4), (8, 8), (10, 8)):
        cache.commit(one, num_computed)
        assert matched(cache, TWENTY) == num_found, num_computed
    leave(cache, one)
    assert matched(cache, TWENTY) == 8, "they stay when nobody uses them"
    assert cache.stats() == CacheStats(0, 2, 14)


@pytest.mark.parametrize(("num_tokens", "num_found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (20, 16), (21, 20)])
def test_the_last_token_is_always_left_to_compute(kind: type[SharingCache], num_tokens: int, num_found: int) -> None:
    cache = build(kind)
    compute(cache, request("a", TWENTY))
    assert matched(cache, [*TWENTY, 20][:num_tokens]) == num_found


@pytest.mark.parametrize(
    ("tokens", "num_found"),
    [
        ([*range(8), 99, *range(9, 20)], 8),
        ([99, *range(1, 20)], 0),
        ([*range(4, 20)], 0),
        ([*range(4), *range(8, 20)], 4),
        ([*range(4), *range(4), *range(8, 20)], 4),
    ],
    ids=["differs later", "differs at once", "starts later", "skips", "repeats"],
)
def test_as_much_is_found_as_is_equal_from_the_start(tokens: Tokens, num_found: int) -> None:
    for cache in map(build, ALL):
        leave(cache, compute(cache, request("a", TWENTY)))
        assert matched(cache, tokens) == num_found


def test_who_reuses_takes_the_same_blocks_and_counts_as_their_owner(kind: type[SharingCache]) -> None:
    cache = build(kind)
    one = compute(cache, request("a", TEN))
    two = request("b", TWENTY)
    assert cache.num_missing_blocks(two, 20) == 3
    compute(cache, two)
    table = list(cache.block_table(one))
    assert list(cache.block_table(two))[:2] == table[:2] and table[2] not in cache.block_table(two)
    assert cache.census()[table[0]] == ("a", "b") and cache.stats() == CacheStats(6, 0, 10)
    leave(cache, one)
    assert cache.stats() == CacheStats(5, 0, 11), "what two use stays until both are gone"
    leave(cache, two)
    assert cache.stats() == CacheStats(0, 5, 11)


def test_tenants_never_share() -> None:
    for cache in map(build, ALL):
        leave(cache, compute(cache, request("a", TEN, tenant="red")))
        found = [matched(cache, TWENTY, tenant) for tenant in ("red", "", "blue", "re", "red ")]
        assert found == [8, 0, 0, 0, 0]
        compute(cache, request("b", TEN, tenant="blue"))
        assert matched(cache, TWENTY, "blue") == 8 and cache.stats() == CacheStats(3, 2, 11)


def test_a_prompt_whose_log_probabilities_are_wanted_runs_in_full_and_is_published_all_the_same(
    kind: type[SharingCache],
) -> None:
    cache = build(kind)
    leave(cache, compute(cache, request("a", TEN)))
    asks = request("b", TWENTY, prompt_logprobs=1)
    assert cache.match(asks) == 0 and cache.num_missing_blocks(asks, 20) == 5
    leave(cache, compute(cache, asks))
    assert matched(cache, [*TWENTY, 20]) == 20 and cache.stats() == CacheStats(0, 5, 11), "one copy of each is kept"


def test_nothing_is_reused_with_prefix_off() -> None:
    cache = build(PagedCache, prefix=False)
    one, two = compute(cache, request("a", TEN)), compute(cache, request("b", TEN))
    assert matched(cache, TWENTY) == 0 and not {*cache.block_table(one)} & {*cache.block_table(two)}
    leave(cache, one, two)
    assert cache.stats() == CacheStats(0, 0, 16)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_policy_is_refused_where_nothing_is_kept(prefix: bool) -> None:
    assert PagedSettings(prefix=prefix, eviction="lru").prefix is prefix, "the default is no wish"
    with nullcontext() if prefix else pytest.raises(ValidationError, match="eviction=lfu does nothing with prefix=off"):
        PagedSettings(prefix=prefix, eviction="lfu")


def test_cached_blocks_make_room_and_are_forgotten(kind: type[SharingCache]) -> None:
    cache = build(kind, num_blocks=4)
    leave(cache, compute(cache, request("a", TWENTY[:16])))
    assert cache.stats() == CacheStats(0, 4, 0)
    waiting = request("b", TWENTY[:16])
    assert cache.match(waiting) == 12
    other = compute(cache, request("c", [7] * 8))
    assert (cache.match(waiting), cache.stats()) == (8, CacheStats(2, 2, 0)), "the tail goes first"
    assert cache.num_missing_blocks(waiting, 13) == 4 and not cache.allocate(waiting, 13)
    assert cache.num_missing_blocks(waiting, 12) == 3 and not cache.allocate(waiting, 12)
    leave(cache, other)
    assert cache.allocate(waiting, 16) and cache.stats() == CacheStats(4, 0, 0)
    cache.check()


def test_copies_computed_side_by_side_are_one_prefix(kind: type[SharingCache]) -> None:
    cache = build(kind)
    one, two = request("a", TWENTY), request("b", TWENTY)
    assert cache.allocate(one, 20) and cache.allocate(two, 20)
    cache.commit(one, 8), cache.commit(two, 20), cache.commit(one, 12)
    cache.check()
    assert cache.stats() == CacheStats(10, 0, 6) and matched(cache, [*TWENTY, 20]) == 20
    leave(cache, one)
    assert cache.stats() == CacheStats(5, 0, 11), "the spare copies are free at once"
    leave(cache, two)
    assert cache.stats() == CacheStats(0, 5, 11) and matched(cache, [*TWENTY, 20]) == 20


def test_truncating_takes_back_what_was_published_of_the_tail_only(kind: type[SharingCache]) -> None:
    cache, one = build(kind), request("a", TWENTY)
    compute(cache, one)
    cache.truncate(one, 9)
    cache.check()
    assert len(cache.block_table(one)) == 3 and cache.stats() == CacheStats(3, 2, 11)
    compute(cache, one)
    assert cache.stats() == CacheStats(5, 0, 11), "its own copies replace the unused ones"
    leave(cache, one)
    assert matched(cache, [*TWENTY, 20]) == 20


def test_a_commit_costs_the_new_blocks_and_asking_again_costs_nothing() -> None:
    cache, one = build(Counting, num_blocks=64), request("a", list(range(200)))
    assert cache.allocate(one, 200)
    costs = []
    for end in range(1, 201):
        before = Counting.num_hashed
        cache.commit(one, end)
        costs.append(Counting.num_hashed - before)
    assert all(cost <= 3 for cost in costs) and sum(map(bool, costs)) == 50, "a block is hashed when it is full"
    waiting = request("b", list(range(190)))
    assert cache.match(waiting) == 188
    before = Counting.num_hashed
    assert [cache.match(waiting) for _ in range(100)] == [188] * 100 and Counting.num_hashed == before
    assert cache.allocate(waiting, 190) and Counting.num_hashed == before, "allocating looks nothing up again"


def test_many_requests_can_be_looked_up_in_turn(kind: type[SharingCache]) -> None:
    """Each as if it were alone; of those that never start only the latest are remembered."""
    cache = build(kind)
    leave(cache, compute(cache, request("a", TWENTY)))
    requests = [request(str(n), [*TWENTY[:n], 99]) for n in range(21)] * 20
    for _ in range(2):
        assert [cache.match(one) for one in requests] == [n // 4 * 4 for n in range(21)] * 20
    for _ in range(500):
        cache.match(request("new", TWENTY))
    assert len(cache._index._found) <= 256


def test_reuse_without_eviction_does_not_pile_up_anything(kind: type[SharingCache]) -> None:
    cache = build(kind)
    for number in range(300):
        one = request(str(number), TEN)
        assert cache.allocate(one, 10)
        cache.commit(one, 10), cache.free(one)
    cache.check()
    assert len(cache._index._queue) < 100 and cache.stats() == CacheStats(0, 2, 14)
    leave(cache, compute(cache, request("all", list(range(100, 164)))))
    assert len(cache._index._roots) == 1 and len(cache._index._of_block) == 16
    leave(cache, compute(cache, request("all", list(range(100, 164)), tenant="other")))
    assert len(cache._index._roots) == 1, "nothing is kept of a tenant without blocks"


@pytest.mark.parametrize(
    ("cache", "eviction"), [(EightBits, "lru"), (Constant, "lru"), (Constant, "lfu"), (Constant, "fifo")]
)
def test_colliding_hashes_are_harmless(cache: type[PagedCache], eviction: str) -> None:
    coverage = check_cache(cache, options={"eviction": eviction}, seeds=range(12, 15))
    same = check_cache(PagedCache, options={"eviction": eviction}, seeds=range(12, 15))
    assert coverage == same and coverage.num_cached_tokens > 20, coverage


@pytest.mark.parametrize(
    "breakage",
    [
        lambda cache: cache._num_published.update(a=1),
        lambda cache: cache._num_published.update(b=1),
        lambda cache: cache._index._of_block.popitem(),
        lambda cache: setattr(cache._index, "num_idle", 1),
        lambda cache: cache._index._of_block[cache._tables["a"][1]].blocks.clear(),
        lambda cache: setattr(cache._index._of_block[cache._tables["a"][1]], "is_idle", True),
        lambda cache: cache._index._roots.clear(),
        lambda cache: cache._tables["a"].reverse(),
        lambda cache: cache.free(Request("c", [1], SamplingParams())) or cache._index._queue.clear(),
    ],
)
def test_broken_books_are_noticed(kind: type[SharingCache], breakage: Any) -> None:
    cache = build(kind)
    compute(cache, request("a", TWENTY[:8]))
    leave(cache, compute(cache, request("c", [50] * 8)))
    breakage(cache)
    with pytest.raises(AssertionError):
        cache.check()


@pytest.mark.parametrize(
    "breakage",
    [
        lambda index: setattr(index._of_block[0], "num_children", 2),
        lambda index: setattr(index._of_block[0], "key", 1),
        lambda index: setattr(index._of_block[0], "parent", None),
        lambda index: index._by_key.popitem(),
        lambda index: index._roots.update({(1,): index._roots[()]}) or index._roots.pop(()),
    ],
)
def test_broken_tables_are_noticed(breakage: Any) -> None:
    cache = build(PagedCache)
    compute(cache, request("a", TWENTY[:8]))
    breakage(cache._index)
    with pytest.raises(AssertionError):
        cache.check()

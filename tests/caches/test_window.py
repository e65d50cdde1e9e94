"""What a window releases while a request runs, and what of it is found again."""

from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.interfaces.cache import CacheSpec, CacheStats
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.simulation import simulate
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import draw_world, windowed
from llmkit.types import Request, SamplingParams
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from llmkit_caches.sharing import RELEASED, SharingCache

FORTY = list(range(40))


@pytest.fixture(params=[PagedCache, RadixCache])
def kind(request: pytest.FixtureRequest) -> type[SharingCache]:
    """The caches that release."""
    cache: type[SharingCache] = request.param
    return cache


def build(cache: type[Any], num_blocks: int = 8, window: int = 6, **options: Any) -> Any:
    """Blocks of four tokens."""
    return build_cache(cache, CacheSpec(num_blocks, 4, window), options)


def request(name: str, num_tokens: int = 40, tokens: list[int] = FORTY) -> Request:
    return Request(name, tokens[:num_tokens], SamplingParams(max_tokens=1))


def run(cache: SharingCache, one: Request, start: int = 0, chunk: int = 4) -> Request:
    """Reserve and compute all tokens of `one` in chunks."""
    for end in range(start + chunk, one.num_tokens + chunk, chunk):
        assert cache.allocate(one, min(end, one.num_tokens))
        cache.commit(one, min(end, one.num_tokens))
        cache.check()
    return one


@pytest.mark.parametrize(
    ("window", "start", "num_hidden"),
    [
        (None, 100, 0),
        (6, 8, 0),
        (6, 9, 1),  # sees 4 to 9
        (6, 12, 1),
        (6, 13, 2),
        (8, 11, 1),  # sees 4 to 11
        (8, 10, 0),
        (1, 7, 0),  # sees itself, but the block before it is kept
        (1, 8, 1),
        (1, 12, 2),
    ],
)
def test_blocks_are_hidden_when_their_last_key_is(window: int | None, start: int, num_hidden: int) -> None:
    assert CacheSpec(8, 4, window).num_hidden_blocks(start) == num_hidden


def test_a_running_request_keeps_what_its_window_reaches(kind: type[SharingCache]) -> None:
    cache, one = build(kind), request("a", 20)
    assert cache.allocate(one, 20)
    before = list(cache.block_table(one))
    for num_computed, num_released in ((4, 0), (8, 0), (9, 1), (12, 1), (13, 2), (20, 3)):
        cache.commit(one, num_computed)
        cache.check()
        assert cache.num_released_blocks(one) == num_released
        assert list(cache.block_table(one)) == [RELEASED] * num_released + before[num_released:]
    assert cache.census() == dict.fromkeys(before[3:], ("a",))
    assert cache.stats() == CacheStats(2, 3, 3), "published blocks are kept for others"


def test_a_request_longer_than_the_pool_runs(kind: type[SharingCache]) -> None:
    cache = build(kind, 3)
    assert cache.max_num_tokens is None
    one = run(cache, request("a"))
    assert cache.stats().num_used_blocks == 2
    cache.free(one)
    cache.check()
    assert cache.stats().num_unowned_blocks == 3


def test_without_prefix_caching_released_blocks_are_free() -> None:
    cache = build(PagedCache, 3, prefix=False)
    run(cache, request("a"))
    assert cache.stats() == CacheStats(2, 0, 1)


@pytest.mark.parametrize(("num_blocks", "window"), [(2, 5), (3, 9), (1, 1)])
def test_a_pool_that_does_not_hold_the_window_and_a_block_limits_the_length(num_blocks: int, window: int) -> None:
    assert build(PagedCache, num_blocks, window).max_num_tokens == 4 * num_blocks
    assert build(PagedCache, num_blocks + 1, window).max_num_tokens is None


def test_a_contiguous_run_is_held_whole() -> None:
    cache, one = build(ContiguousCache), request("a", 20)
    one.max_num_tokens = 32
    assert cache.max_num_tokens == 32 and cache.allocate(one, 20)
    cache.commit(one, 20)
    assert cache.num_released_blocks(one) == 0 and cache.stats().num_used_blocks == 8


def test_a_newcomer_takes_of_a_cached_prefix_what_it_sees(kind: type[SharingCache]) -> None:
    cache = build(kind, 16)
    cache.free(run(cache, request("a", 32)))
    two = request("b")
    assert cache.match(two) == 32 and cache.stats() == CacheStats(0, 8, 8)
    assert cache.num_missing_blocks(two, 33) == 3, "two cached and a new one"
    assert cache.allocate(two, 33)
    cache.check()
    assert cache.num_released_blocks(two) == 6 and len(cache.block_table(two)) == 9
    assert cache.stats() == CacheStats(3, 6, 7)


def test_what_is_evicted_before_the_window_does_not_matter(kind: type[SharingCache]) -> None:
    """A pool of four blocks has seen ten of one request: it can go on from the end, but not from the middle."""
    cache = build(kind, 4)
    cache.free(run(cache, request("a")))
    assert cache.match(request("b", 40)) == 36
    assert cache.match(request("b", 28)) == 0
    run(cache, request("b", 40), start=36)


def test_a_gap_in_the_window_shortens_the_prefix(kind: type[SharingCache]) -> None:
    """First in, first out: the first block goes, and with it all prefixes whose end sees it."""
    cache = build(kind, 8, window=10, eviction="fifo")
    cache.free(run(cache, request("a", 16)))
    assert cache.match(request("b", 17)) == 16
    cache.allocate(request("c", 17, [99] * 17), 17)
    cache.check()
    assert cache.stats() == CacheStats(5, 3, 0)
    assert [cache.match(request("b", num_tokens)) for num_tokens in (17, 16, 13, 9)] == [16, 0, 0, 0]


def test_releases_of_one_request_do_not_touch_another(kind: type[SharingCache]) -> None:
    cache = build(kind, 16)
    one, two = run(cache, request("a", 12)), request("b", 16)
    assert cache.match(two) == 12 and cache.allocate(two, 13)
    shared = list(cache.block_table(two))[1:3]
    assert shared == list(cache.block_table(one))[1:3]
    run(cache, two, start=12)
    cache.commit(two, 16)
    assert cache.num_released_blocks(two) == 2 and cache.num_released_blocks(one) == 1
    assert cache.census()[shared[0]] == ("a",)


def test_truncating_to_released_blocks_gives_back_all(kind: type[SharingCache]) -> None:
    cache, one = build(kind), request("a", 20)
    run(cache, one)
    cache.truncate(one, 17)
    assert len(cache.block_table(one)) == 5 and cache.num_released_blocks(one) == 3
    cache.truncate(one, 9)
    cache.check()
    assert not cache.block_table(one) and cache.num_released_blocks(one) == 0
    assert cache.stats().num_used_blocks == 0


def test_walks_with_windows_hold_what_the_kit_is_to_see(kind: type[SharingCache]) -> None:
    """Requests longer than the pool, prefixes that are found behind what was released, preemptions."""
    num_longer = num_behind = num_preemptions = 0

    class Watched(kind):  # type: ignore[misc, valid-type]
        def allocate(self, request: Request, upto: int) -> bool:
            nonlocal num_longer, num_behind
            is_new = not self.block_table(request)
            is_granted: bool = super().allocate(request, upto)
            num_longer += upto > self.spec.num_slots and is_granted
            num_behind += is_new and self.num_released_blocks(request) > 0
            return is_granted

    for seed in range(24):
        world = windowed(draw_world(seed))
        scheduler = build_scheduler(ContinuousBatching, world.scheduler_options, {})
        num_preemptions += Walk(world, scheduler, build_cache(Watched, world.spec, {}), seed % 3).run().num_preemptions
    assert num_longer > 100 and num_behind > 10 and num_preemptions > 40, (num_longer, num_behind, num_preemptions)


@pytest.mark.parametrize("depth", [0, 1])
def test_simulated_requests_may_be_longer_than_the_pool(kind: type[SharingCache], depth: int) -> None:
    """The fake executor reads what a window sees; a second time most of the prompt is behind what was released."""
    cache = build(kind, 8, window=10)
    scheduler = build_scheduler(ContinuousBatching, {"max_num_batched_tokens": 9}, {})
    target = simulate(scheduler, cache, lambda plan: 1.0, depth=depth)
    first, second = (target.generate([FORTY], SamplingParams(max_tokens=50))[0] for _ in range(2))
    assert len(first.token_ids) == 50 and first.token_ids == second.token_ids
    (longer,) = target.generate([[*FORTY, *first.token_ids[:40]]], SamplingParams(max_tokens=10))
    assert longer.token_ids == first.token_ids[40:] and longer.metrics.num_cached_tokens >= 64

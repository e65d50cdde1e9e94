"""Several allocators as one: all of them hold a request or none does, and a prefix is what all of them find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llmkit.engine.grouped_cache import GroupedCache
from llmkit.interfaces.cache import CacheSpec, CacheStats
from llmkit.testing import ReferenceCache
from llmkit.types import Request, SamplingParams
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from tests.testing.test_mutants import Bug, plant

SIZE, WINDOW = 4, 6


@pytest.fixture(params=[PagedCache, RadixCache])
def kind(request: pytest.FixtureRequest) -> type[Any]:
    """The caches that can be grouped."""
    cache: type[Any] = request.param
    return cache


def build(kind: type[Any] = PagedCache, num_blocks: int = 16, num_windowed: int = 8, **options: Any) -> GroupedCache:
    """A group that sees all, and one that sees six keys, in blocks of four."""
    specs = CacheSpec(num_blocks, SIZE), CacheSpec(num_windowed, SIZE, WINDOW)
    return GroupedCache([kind(kind.Settings(**options), spec) for spec in specs])


def request(name: str, num_tokens: int = 40) -> Request:
    return Request(name, list(range(num_tokens)), SamplingParams(max_tokens=1))


def run(cache: GroupedCache, one: Request, start: int = 0) -> Request:
    """Compute all tokens of `one`, a block at a time."""
    for end in range(start + SIZE, one.num_tokens + SIZE, SIZE):
        assert cache.allocate(one, min(end, one.num_tokens))
        cache.commit(one, min(end, one.num_tokens))
        cache.check()
    return one


def used(cache: GroupedCache) -> list[int]:
    return [group.stats().num_used_blocks for group in cache.groups]


def test_the_windowed_group_releases_and_the_other_keeps(kind: type[Any]) -> None:
    cache = build(kind)
    one = run(cache, request("a"))
    assert used(cache) == [10, 2]
    assert [group.num_released_blocks(one) for group in cache.groups] == [0, 8]
    assert len({len(group.block_table(one)) for group in cache.groups}) == 1
    assert cache.num_released_blocks(one) == 0 and cache.block_table(one) == cache.groups[0].block_table(one)
    assert cache.stats() == cache.groups[0].stats() == CacheStats(10, 0, 6)
    assert cache.census() == dict.fromkeys(cache.block_table(one), ("a",))
    cache.free(one)
    cache.check()
    assert used(cache) == [0, 0]


def test_a_prefix_is_as_long_as_all_groups_find_it(kind: type[Any]) -> None:
    """The window's pool has kept the last blocks only: from there on a request can go on, from the middle it cannot."""
    cache = build(kind, num_windowed=4)
    cache.free(run(cache, request("a")))
    full, windowed = cache.groups
    middle, longer = request("b", 29), request("c")
    assert full.match(middle) == 28 and windowed.match(middle) == 0 == cache.match(middle)
    assert full.match(longer) == windowed.match(longer) == 36 == cache.match(longer)
    assert cache.allocate(longer, 40)
    assert [group.num_released_blocks(longer) for group in cache.groups] == [0, 7]
    cache.check()


class Finding(ReferenceCache):
    """Finds prefixes of certain lengths."""

    reuses_prefixes = True
    lengths: Sequence[int] = ()

    def match(self, request: Request) -> int:
        return self.lengths[-1]

    def match_within(self, request: Request, most: int) -> int:
        return max(length for length in self.lengths if length <= most)


@pytest.mark.parametrize(
    ("found", "agreed"),
    [
        ([(0, 8, 12, 20, 32), (0, 12, 16, 28)], 12),
        ([(0, 12, 16, 28), (0, 8, 12, 20, 32)], 12),
        ([(0, 4), (0, 8), (0, 4, 8)], 0),
        ([(0, 20), (0, 4, 20), (0, 20, 24)], 20),
    ],
)
def test_groups_are_asked_until_they_agree(found: list[tuple[int, ...]], agreed: int) -> None:
    groups = [Finding(Finding.Settings(), CacheSpec(16, SIZE)) for _ in found]
    for group, lengths in zip(groups, found, strict=True):
        group.lengths = lengths
    assert GroupedCache(groups).match(request("a")) == agreed


def test_a_group_reuses_no_more_than_all_find(kind: type[Any]) -> None:
    """What a group would find for itself is left alone, or it would be written again."""
    cache = build(kind, num_windowed=4)
    cache.free(run(cache, request("a")))
    full = cache.groups[0]
    middle = request("b", 29)
    published = [cached.blocks[0] for cached in full._index.find(request("c"))]  # type: ignore[attr-defined]
    assert cache.match(middle) == 0 and full.match(middle) == 28
    assert cache.allocate(middle, 8)
    assert not set(full.block_table(middle)) & set(published)
    cache.check()


def test_nothing_is_taken_unless_every_group_has_room() -> None:
    cache = build(num_windowed=3)
    assert not cache.allocate(request("a"), 16)
    assert used(cache) == [0, 0]
    one = request("b")
    assert cache.allocate(one, 12) and not cache.allocate(one, 16)
    assert used(cache) == [3, 3] and len(cache.block_table(one)) == 3


def test_what_cannot_be_had_evicts_nothing() -> None:
    cache = build(num_blocks=12, num_windowed=4)
    cache.free(run(cache, request("a")))
    before = [group.stats() for group in cache.groups]
    assert not cache.allocate(Request("b", [7] * 40, SamplingParams(max_tokens=1)), 20)
    assert [group.stats() for group in cache.groups] == before and cache.match(request("c")) == 36


class Refusing(PagedCache):
    """Says that it has room, and then refuses or raises."""

    fault: Callable[[], bool] | None = None

    def allocate(self, request: Request, upto: int) -> bool:
        return self.fault() if self.fault else super().allocate(request, upto)

    def allocate_within(self, request: Request, upto: int, most: int) -> bool:
        return self.fault() if self.fault else super().allocate_within(request, upto, most)


@pytest.mark.parametrize("num_held", [0, 8])
@pytest.mark.parametrize("raises", [False, True])
def test_a_group_that_fails_takes_nobody_along(num_held: int, raises: bool) -> None:
    cache, one = build(Refusing), request("a")
    if num_held:
        assert cache.allocate(one, num_held)
    before = [group.census() for group in cache.groups]
    cache.groups[1].fault = (lambda: 1 // 0 > 0) if raises else lambda: False  # type: ignore[attr-defined]
    if raises:
        with pytest.raises(ZeroDivisionError):
            cache.allocate(one, 16)
    else:
        assert not cache.allocate(one, 16)
    assert [group.census() for group in cache.groups] == before
    cache.check()


def test_truncating_leaves_no_group_with_nothing(kind: type[Any]) -> None:
    cache = build(kind)
    one = run(cache, request("a"))
    assert cache.allocate(one, 52)
    cache.truncate(one, 41)
    assert [len(group.block_table(one)) for group in cache.groups] == [11, 11]
    cache.truncate(one, 4)
    assert [len(group.block_table(one)) for group in cache.groups] == [9, 9], "eight are released"
    cache.check()


def test_the_group_that_reaches_least_bounds_a_request() -> None:
    assert build(num_blocks=16, num_windowed=8).max_num_tokens == 64
    assert build(num_blocks=16, num_windowed=2).max_num_tokens == 8, "no room for the window and a block"
    windows = CacheSpec(8, SIZE, 12), CacheSpec(4, SIZE, WINDOW)
    assert GroupedCache([PagedCache(PagedCache.Settings(), spec) for spec in windows]).max_num_tokens is None


BUGS: dict[str, tuple[Bug, Callable[[], None]]] = {
    "groups are asked only once": (
        (GroupedCache.match, "while num_cached != agreed:", "for _ in range(1):"),
        lambda: test_groups_are_asked_until_they_agree([(0, 8, 12, 20, 32), (0, 12, 16, 28)], 12)),
    "a start that fails is not undone": (
        (GroupedCache.allocate, "lambda group: group.free(request)", "lambda group: 0"),
        lambda: test_a_group_that_fails_takes_nobody_along(0, False)),
    "growth that fails is not undone": (
        (GroupedCache.allocate, "lambda group: group.truncate(request, reach)", "lambda group: 0"),
        lambda: test_a_group_that_fails_takes_nobody_along(8, False)),
    "what is taken before an error stays": (
        (GroupedCache._all, "finally:", "except ZeroDivisionError: raise\n    else:"),
        lambda: test_a_group_that_fails_takes_nobody_along(8, True)),
    "all groups have room if the first has": (
        (GroupedCache._all, "if not take(group):", "if not take(group) and group is self.groups[0]:"),
        lambda: test_a_group_that_fails_takes_nobody_along(8, False)),
    "groups evict before others are asked": (
        (GroupedCache.allocate, "return False", "pass"), test_what_cannot_be_had_evicts_nothing),
    "truncating empties a group": (
        (GroupedCache.truncate, "if num_released:", "if False:"),
        lambda: test_truncating_leaves_no_group_with_nothing(PagedCache)),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_these_tests_bite(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, check = BUGS[bug]
    plant(monkeypatch, planted)
    with pytest.raises(AssertionError):
        check()

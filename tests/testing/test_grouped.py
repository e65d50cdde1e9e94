"""Groups of layers under the whole kit: walks, audits and state machines with two and three; seeded bugs in them."""

from __future__ import annotations

from typing import Any
from unittest import TestCase

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from llmkit.batching import ContinuousBatching
from llmkit.engine.grouped_cache import GroupedCache
from llmkit.engine.planner import Planner
from llmkit.engine.residency import Residency
from llmkit.engine.steady import SteadyDecode
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.testing import Chaos, Coverage, OracleExecutor, ReferenceCache, check_cache
from llmkit.testing.caches import audit
from llmkit.testing.grouped import GroupedOracle, grouped
from llmkit.testing.machine import cache_machine, walk_machine
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import draw_world, windowed
from llmkit.types import Admission, BlockTableEdit, SamplingParams, ScheduledRequest, StepPlan, StepResult
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache
from llmkit_caches.sharing import SharingCache
from llmkit_schedulers.continuous import Continuous
from tests.testing.test_mutants import Bug, plant

CACHES = [PagedCache, RadixCache]
QUICK = settings(max_examples=15, stateful_step_count=25, deadline=None, derandomize=True, database=None)


def walk_all(cache: type[CacheAllocator], seeds: range) -> Coverage:
    """Walks with groups, in every third world with a window in the first group too."""
    coverage = Coverage()
    for seed in seeds:
        world = draw_world(seed) if seed % 3 else windowed(draw_world(seed))
        for kind, depth in ((ContinuousBatching, 0), (ContinuousBatching, 1), (Chaos, 2)):
            scheduler = build_scheduler(kind, world.scheduler_options, {})
            allocator = build_cache(grouped(cache), world.spec, {})
            coverage += Walk(world, scheduler, allocator, depth, is_strict=kind is not Chaos).run()
    return coverage


@pytest.mark.parametrize("cache", CACHES)
def test_walks_with_groups(cache: type[CacheAllocator]) -> None:
    coverage = walk_all(cache, range(18))
    assert coverage.num_steps > 5000 and coverage.num_preemptions > 900 and coverage.num_cached_tokens > 300, coverage
    assert coverage.num_copied_blocks > 20, coverage


@pytest.mark.parametrize("cache", CACHES)
def test_groups_keep_the_promises_of_a_cache(cache: type[CacheAllocator]) -> None:
    ledgers = [audit(grouped(cache, False), seed, {}, 100, seed % 2 > 0) for seed in range(100)]
    assert sum(ledger.num_refusals for ledger in ledgers) > 500 and sum(ledger.num_forks for ledger in ledgers) > 80


class GroupedMachine(cache_machine(grouped(PagedCache, False)).TestCase, TestCase):  # type: ignore[misc]
    settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("depth", [0, 1])
def test_the_machine_walks_with_groups(cache: type[CacheAllocator], depth: int) -> None:
    run_state_machine_as_test(walk_machine(Continuous, grouped(cache), depth), settings=QUICK)


def test_the_kit_takes_groups_where_a_cache_can(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[GroupedCache] = []

    def watching(self: GroupedCache, groups: list[CacheAllocator]) -> None:
        init(self, groups)
        built.append(self)

    init = GroupedCache.__init__
    monkeypatch.setattr(GroupedCache, "__init__", watching)
    check_cache(ReferenceCache, seeds=[2, 6])
    assert not built
    check_cache(PagedCache, seeds=[2, 6])
    assert len(built) == 14, "alone, and under two schedulers at three depths"


def test_groups_are_two_or_three_with_windows_that_get_narrower() -> None:
    specs = [CacheSpec(blocks, size) for blocks in range(4, 25) for size in range(1, 9)]
    caches = [build_cache(grouped(PagedCache), spec, {}) for spec in specs]
    sizes = set()
    for cache, spec in zip(caches, specs, strict=True):
        assert isinstance(cache, GroupedCache) and cache.groups[0].spec == spec
        windows = [group.spec.window or 1 << 30 for group in cache.groups]
        assert windows == sorted(windows, reverse=True) and cache.groups[1].spec.window
        sizes.add((len(windows), cache.groups[1].spec.num_blocks < spec.num_blocks))
    assert sizes == {(2, True), (2, False), (3, True), (3, False)}


def row(end: int, start: int = 0) -> ScheduledRequest:
    return ScheduledRequest("a", 0, start, end - start, True, 1)


def test_every_group_reads_its_own_blocks() -> None:
    """Blocks that one group has may be anybody's in another; a wrong one is found in the group that reads it."""
    groups = [OracleExecutor(2, 4, 16, 50, window=window) for window in (None, 3)]
    oracle = GroupedOracle(groups)
    admission = Admission(0, "a", (5, 6, 7, 8), 4, SamplingParams(), 0)
    edits = (BlockTableEdit(0, 0, (0, 1)),), ((BlockTableEdit(0, 0, (7, 3)),),)
    oracle.launch(StepPlan(0, (row(4),), (admission,), edits[0], None, edits[1])).wait()
    next_edits = (BlockTableEdit(0, 2, (2,)),), ((BlockTableEdit(0, 2, (0,)),),)
    groups[1]._kv[7] = [None, None]  # hidden: the query at 4 sees 2 to 4
    oracle.launch(StepPlan(1, (row(5, 4),), (), next_edits[0], None, next_edits[1])).wait()
    groups[1]._kv[3] = [None, None]
    with pytest.raises(AssertionError, match="'a' reads a wrong KV entry at position 3, block 3"):
        oracle.launch(StepPlan(2, (row(6, 5),)))


def test_groups_that_disagree_are_found() -> None:
    class Saying:
        def __init__(self, token: int) -> None:
            self.token = token

        def launch(self, plan: StepPlan) -> Any:
            return self

        def wait(self) -> StepResult:
            return StepResult(0, [self.token])

    with pytest.raises(AssertionError, match="groups disagree"):
        GroupedOracle([Saying(1), Saying(2)]).launch(StepPlan(0, ())).wait()  # type: ignore[list-item]


MAX_NUM_TOKENS: Any = GroupedCache.__dict__["max_num_tokens"].fget
BUGS: dict[str, Bug] = {
    "a group is left out of a start": (
        GroupedCache.allocate, "lambda group: group.allocate_within(request, upto, most)",
        "lambda group: group is self.groups[-1] or group.allocate_within(request, upto, most)"),
    "a group is left out of growth": (
        GroupedCache.allocate, "lambda group: group.allocate(request, upto)",
        "lambda group: group is self.groups[-1] or group.allocate(request, upto)"),
    "a group is left out of freeing": (GroupedCache.free, "reversed(self.groups)", "self.groups[:-1]"),
    "a group is never told what is computed": (GroupedCache.commit, "in self.groups:", "in self.groups[:-1]:"),
    "the first group alone releases": (GroupedCache.commit, "in self.groups:", "in self.groups[:1]:"),
    "a group releases before the step has landed": (
        GroupedCache.commit, "group.commit(request, num_computed_tokens)",
        "group.commit(request, num_computed_tokens + (group is not self.groups[0] and request.num_in_flight_tokens))"),
    "the first group's prefix counts for all": (
        GroupedCache.match, "group.match_within(request, num_cached)", "num_cached"),
    "each group reuses what it finds itself": (
        GroupedCache.allocate, "group.allocate_within(request, upto, most)", "group.allocate(request, upto)"),
    "groups get the first one's edits": (Residency.more_edits, "_edit(group, one)", "_edit(self.groups[0], one)"),
    "groups are sent nothing while steps repeat": (
        SteadyDecode._grow, "more_edits([row.request for row in rows])", "more_edits([])"),
    "groups are sent nothing": (Planner._edits, "self._residency.more_edits(grown)", "()"),
    "groups get each other's edits": (
        Residency.more_edits, "for group in self.groups[1:]]", "for group in self.groups[:0:-1]]"),
    "a grant is larger than another group's pool": (
        Residency.num_fitting_tokens, "in self._unbound:", "in [g for g in self._unbound if g is self.groups[0]]:"),
    "a first grant counts on blocks that are not hidden": (
        Residency.num_fitting_tokens, "spec.num_hidden_blocks(num_cached_tokens)",
        "spec.num_hidden_blocks(num_cached_tokens + 99)"),
    "a grant counts on blocks that are not released": (
        Residency.num_fitting_tokens, "group.num_released_blocks(request)", "group.num_released_blocks(request) + 1"),
    "the first group bounds a request": (
        MAX_NUM_TOKENS, "in self.groups if", "in self.groups[:1] if"),
    "a group's window is one key too narrow": (
        SharingCache.commit, "self.spec.num_hidden_blocks(",
        "CacheSpec(1, self.spec.block_size, self.spec.window and self.spec.window - 1).num_hidden_blocks("),
    "a group's window is one key too wide": (
        SharingCache.commit, "self.spec.num_hidden_blocks(",
        "CacheSpec(1, self.spec.block_size, self.spec.window and self.spec.window + 1).num_hidden_blocks("),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_groups_are_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, BUGS[bug])
    with pytest.raises(AssertionError, match="seed"):
        walk_all(PagedCache, range(120))

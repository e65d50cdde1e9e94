"""Samples of one prompt in a cache of several groups: each forks them in its own blocks, or none does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmkit.engine.forks import Forks
from llmkit.engine.grouped_cache import GroupedCache, fork_in_groups
from llmkit.engine.planner import Planner
from llmkit.interfaces.cache import CacheSpec
from llmkit.types import BlockCopies, BlockCopy, FinishReason, Request, StepPlan
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from tests.engine.conftest import Rig
from tests.engine.test_forks import add_fork, only, rows
from tests.engine.test_grouped_cache import SIZE, build, kind, request, run
from tests.testing.test_grouped import walk_all
from tests.testing.test_mutants import Bug, plant

__all__ = ["kind"]


def tables(cache: GroupedCache, one: Request) -> list[list[int]]:
    return [list(group.block_table(one)) for group in cache.groups]


def censuses(cache: GroupedCache) -> list[dict[int, tuple[str, ...]]]:
    return [group.census() for group in cache.groups]


def test_every_group_shares_and_copies_its_own_blocks() -> None:
    """Ten tokens: two full blocks, one of which a window of six hides, are shared; a token of the third is copied."""
    cache = build(prefix=False)
    cache.groups[1].allocate(request("other"), SIZE)  # so that block numbers differ
    rig = Rig(cache=cache)
    first, fork = rig.add("a", num_prompt=10), add_fork(rig, "b")
    rig.planner._residency.groups[1].free(request("other"))
    rig.planned(), rig.land()
    plan = rig.planned()
    assert rows(plan)[1] == ("b", 9, 1, True) and len(plan.copies.more_forks) == 1
    for number, group in enumerate(cache.groups):
        theirs, mine = list(group.block_table(first)), list(group.block_table(fork))
        assert mine[:2] == theirs[:2] and mine[2] not in theirs and mine[1] >= 0
        seen = plan.of_group(number)
        assert seen.copies is not None and seen.copies.forks == (BlockCopy(theirs[2], mine[2], 1),)
        assert list(seen.edits[-1].blocks) == mine[number:] and seen.edits[-1].start == number
    assert plan.copies.forks != plan.copies.more_forks[0]
    rig.land()


def test_copies_of_a_group_are_those_of_all_who_start() -> None:
    rig = Rig(cache=build(prefix=False), max_num_batched_tokens=64)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b"), add_fork(rig, "c"), rig.add("d", num_prompt=3)
    rig.planned(), rig.land()
    plan = rig.planned()
    assert [len(forks) for forks in (plan.copies.forks, *plan.copies.more_forks)] == [2, 2]
    rig.land()
    assert rig.planned().copies is None


def test_a_group_that_sees_less_shares_less() -> None:
    """At 29 of 30 tokens a window of six in blocks of four hides six blocks, which the fork has released as well."""
    cache = build(prefix=False)
    rig = Rig(cache=cache, max_num_batched_tokens=64)
    first = rig.add("a", num_prompt=30)
    fork = add_fork(rig, "b", num_prompt=30)
    rig.planned(), rig.land()
    plan = rig.planned()
    assert rows(plan)[1] == ("b", 29, 1, True)
    assert [group.num_released_blocks(fork) for group in cache.groups] == [0, 6]
    assert [group.stats().num_used_blocks for group in cache.groups] == [9, 3]
    assert [edit.edits[-1].start for edit in (plan, plan.of_group(1))] == [0, 6]
    theirs, mine = tables(cache, first)[1], tables(cache, fork)[1]
    assert theirs[6] == mine[6] and theirs[7] != mine[7]
    rig.land()


def test_where_one_group_has_moved_on_nothing_is_forked() -> None:
    """The first group still has all of the prompt; the windowed one has not."""
    rig = Rig(cache=build(prefix=False), max_num_batched_tokens=64)
    first = rig.add("a", num_prompt=14)
    for _ in range(6):
        rig.planned(), rig.land()
    second = add_fork(rig, "b", num_prompt=14)
    assert first.num_released_blocks == 0 and rig.planner._residency.find(second).parent is None
    assert rows(rig.planned(only("b"))) == [("b", 0, 14, True)]
    rig.land()


def test_a_cache_that_does_not_fork_in_one_group_forks_in_none() -> None:
    paged = PagedCache(PagedCache.Settings(), CacheSpec(16, SIZE))
    contiguous = ContiguousCache(ContiguousCache.Settings(), CacheSpec(16, SIZE, 6))
    assert not Forks([paged, contiguous], True).is_on and not Forks([paged], False).is_on
    assert Forks([paged], True).is_on and not GroupedCache([paged, contiguous]).forks


def test_nothing_is_taken_unless_every_group_has_room(kind: type[Any]) -> None:
    cache = build(kind, num_windowed=4)
    parent = run(cache, request("a", 10))
    before, stats = censuses(cache), [group.stats() for group in cache.groups]
    assert fork_in_groups(cache, request("b", 10), parent, 9, 20) is None, "three blocks of its own, of one"
    assert (censuses(cache), [group.stats() for group in cache.groups]) == (before, stats)
    copies = fork_in_groups(cache, request("b", 10), parent, 9, 10)
    assert copies is not None and [len(each) for each in copies] == [1, 1]
    cache.check()


def test_what_cannot_be_had_evicts_nothing() -> None:
    cache = build(num_blocks=12, num_windowed=5)
    cache.free(run(cache, Request("z", [7] * 36, request("z").sampling_params)))
    parent = run(cache, request("a", 10))
    before = [group.stats() for group in cache.groups]
    assert fork_in_groups(cache, request("b", 10), parent, 9, 24) is None
    assert [group.stats() for group in cache.groups] == before


class Failing(PagedCache):
    """Refuses to fork, or raises, where it has a window."""

    raises = False

    def fork(self, request: Request, parent: Request, num_tokens: int, upto: int) -> Any:
        if not self.spec.window:
            return super().fork(request, parent, num_tokens, upto)
        return 1 // 0 if self.raises else None


@pytest.mark.parametrize("raises", [False, True])
def test_a_group_that_fails_takes_nobody_along(raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "raises", raises)
    cache = build(Failing, prefix=False)
    parent = run(cache, request("a", 10))
    before = censuses(cache)
    if raises:
        with pytest.raises(ZeroDivisionError):
            fork_in_groups(cache, request("b", 10), parent, 9, 10)
    else:
        assert fork_in_groups(cache, request("b", 10), parent, 9, 10) is None
    assert censuses(cache) == before
    cache.check()


def test_blocks_come_back_in_every_group_when_the_last_of_them_ends() -> None:
    cache = build(prefix=False)
    rig = Rig(cache=cache)
    first, fork = rig.add("a", num_prompt=10), add_fork(rig, "b")
    rig.planned(), rig.land(), rig.planned(), rig.land()
    for one, num_used in ((first, [3, 2]), (fork, [0, 0])):
        rig.planner.finish(one, FinishReason.ABORT)
        assert [group.stats().num_used_blocks for group in cache.groups] == num_used


BUGS: dict[str, tuple[Bug, Callable[..., None]]] = {
    "a fork that fails is not undone": (
        (GroupedCache.fork_all, "lambda group: group.free(request)", "lambda group: None"),
        lambda patch: test_a_group_that_fails_takes_nobody_along(False, patch)),
    "what is forked before an error stays": (
        (GroupedCache._all, "finally:", "except ZeroDivisionError: raise\n    else:"),
        lambda patch: test_a_group_that_fails_takes_nobody_along(True, patch)),
    "a fork that a group refuses is granted": (
        (GroupedCache.fork_all, "if self._all(take, lambda group: group.free(request)) else None",
         "if [self._all(take, lambda group: group.free(request))] else None"),
        lambda patch: test_a_group_that_fails_takes_nobody_along(False, patch)),
    "groups evict before others are asked": (
        (GroupedCache.fork_all, "return None", "pass"), lambda patch: test_what_cannot_be_had_evicts_nothing()),
    "the first group's cache decides whether there are forks": (
        (Forks.__init__, "for group in groups)", "for group in groups[:1])"),
        lambda patch: test_a_cache_that_does_not_fork_in_one_group_forks_in_none()),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_these_tests_bite(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, check = BUGS[bug]
    plant(monkeypatch, planted)
    with pytest.raises(AssertionError):
        check(monkeypatch)


IN_WALKS: dict[str, Bug] = {
    "groups copy nothing": (StepPlan.of_group, "if forks else None", "if False else None"),
    "groups copy the first one's blocks": (StepPlan.of_group, "forks=forks[number - 1]", "forks=self.copies.forks"),
    "groups copy each other's blocks": (StepPlan.of_group, "forks[number - 1]", "forks[-number]"),
    "groups copy for one of those who start": (
        Planner._copies, "more_forks=tuple(forks[1:])", "more_forks=tuple([each[:1] for each in forks[1:]])"),
    "the first group alone is copied": (Planner._copies, "more_forks=tuple(forks[1:])", "more_forks=()"),
    "a group is left out of a fork": (
        GroupedCache.fork_all, "group.fork(request, parent, num_tokens, upto)",
        "() if group is self.groups[-1] else group.fork(request, parent, num_tokens, upto)"),
    "a group forks on a token less": (
        GroupedCache.fork_all, "parent, num_tokens, upto)",
        "parent, num_tokens - (group is not self.groups[0] and num_tokens > 1), upto)"),
    "what another group has released is shared": (Forks._holds, "for group in groups)", "for group in groups[:1])"),
    "the first group's window counts for all": (
        Forks._holds, "group.spec.num_hidden_blocks(", "groups[-1].spec.num_hidden_blocks("),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", IN_WALKS)
def test_walks_find_bugs_of_forks_in_groups(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, IN_WALKS[bug])
    with pytest.raises(AssertionError, match="seed"):
        walk_all(PagedCache, range(120))


def test_a_plan_without_copies_has_none_in_any_group() -> None:
    plan = StepPlan(0, (), more_edits=((), ()))
    assert plan.of_group(1).copies is None
    copies = BlockCopies(forks=(BlockCopy(1, 2, 3),), more_forks=((BlockCopy(4, 5, 3),), ()))
    forked = replace(plan, copies=copies)
    assert forked.of_group(1).copies == BlockCopies(forks=(BlockCopy(4, 5, 3),))
    assert forked.of_group(2).copies == BlockCopies()

"""Blocks of forks: who gives them back when, what is missing, what a window and host memory have to do with it."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.engine.swapping import HostPool, SwapCosts
from llmkit.interfaces.cache import CacheSpec, CacheStats
from llmkit.interfaces.scheduler import DenialReason, Denied, Grant
from llmkit.testing.schedulers import build_cache
from llmkit.types import FinishReason, RequestStatus
from llmkit_caches.paged import PagedCache
from tests.engine.test_forks import add_fork, only, preempt, rows


def test_taken_back_in_the_same_step_nothing_is_copied(make_rig: Any) -> None:
    rig = make_rig(prefix=False)
    rig.add("a", num_prompt=10)
    second = add_fork(rig, "b")
    rig.planned(), rig.land()

    def start_and_preempt(queue: Any, step: Any) -> None:
        step.run(queue.running[0], 1)
        assert step.run(queue.waiting[0], 10)
        assert step.preempt(queue.waiting[0]) == 1, "the rest belongs to the first as well"

    plan = rig.planned(start_and_preempt)
    assert plan.copies is None and second.status is RequestStatus.PREEMPTED and rig.num_free_blocks == 5
    assert rows(rig.planned())[1] == ("b", 9, 1, True)


def test_a_scheduler_that_raises_gives_shared_blocks_back(make_rig: Any) -> None:
    rig = make_rig(prefix=False)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b")
    rig.planned(), rig.land()

    def start_and_raise(queue: Any, step: Any) -> None:
        step.run(queue.waiting[0], 9)
        raise KeyError("trouble")

    with pytest.raises(KeyError):
        rig.plan(start_and_raise)
    assert rig.allocator.stats() == CacheStats(3, 0, 5)
    assert rows(rig.planned())[1] == ("b", 9, 1, True)


def test_the_parent_may_give_way_in_the_same_step(make_rig: Any) -> None:
    """Its last block goes to others at once; it is read before anybody writes there."""
    rig = make_rig(prefix=False, num_blocks=4)
    first = rig.add("a", num_prompt=10)
    second = add_fork(rig, "b")
    rig.planned(), rig.land()
    last = rig.allocator.block_table(first)[2]

    def start_and_preempt_parent(queue: Any, step: Any) -> None:
        assert step.run(queue.waiting[0], 10)
        assert step.preempt(queue.running[0]) == 1
        assert step.run(queue.waiting[1], 10)

    rig.add("c", num_prompt=4)
    plan = rig.planned(start_and_preempt_parent)
    assert plan.copies.forks == ((last, rig.allocator.block_table(second)[2], 1),)
    assert rig.allocator.block_table(rig.planner.requests["c"]) == [last]


@pytest.mark.parametrize("prefix", [True, False])
def test_only_its_own_blocks_are_missing(make_rig: Any, prefix: bool) -> None:
    rig = make_rig(prefix=prefix, num_blocks=4)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b"), add_fork(rig, "c")
    rig.planned(), rig.land()
    seen: list[Any] = []

    def look(queue: Any, step: Any) -> None:
        view, other = queue.waiting
        seen.append((step.num_missing_blocks(view), view.num_cached_tokens))
        seen.append((step.run(view, 10), step.num_missing_blocks(view), view.num_cached_tokens))
        seen.append((step.run(other, 10), step.num_missing_blocks(other), other.num_cached_tokens))

    plan = rig.planned(look)
    assert seen == [(1, 9), (Grant(1), 0, 0), (Denied(DenialReason.NO_BLOCKS), 1, 9)]
    assert rows(plan) == [("b", 9, 1, True)]


def test_a_window_that_has_moved_on_leaves_nothing_to_share(make_rig: Any) -> None:
    rig = make_rig(cache=build_cache(PagedCache, CacheSpec(12, 4, window=6), {"prefix": False}))
    first = rig.add("a", num_prompt=14)
    second = add_fork(rig, "b", num_prompt=14)
    rig.planned(), rig.land()
    plan = rig.planned(only("b"))
    assert rows(plan) == [("b", 13, 1, True)] and second.num_released_blocks == first.num_released_blocks == 2
    held = slice(second.num_released_blocks, 3)
    assert rig.allocator.block_table(second)[held] == rig.allocator.block_table(first)[held]
    assert plan.edits[0].start == 2 and len(plan.copies.forks) == 1
    rig.land()
    rig.planner.finish(second, FinishReason.ABORT)
    for _ in range(4):
        rig.planned(), rig.land()
    third = add_fork(rig, "c", num_prompt=14)
    assert first.num_released_blocks == 3 and rig.planner._residency.find(third).parent is None


def test_a_fork_needs_nothing_from_the_host(make_rig: Any) -> None:
    host = HostPool(8, 4, SwapCosts(1.0, 0.0, 0.0))
    rig = make_rig(prefix=False, host=host)
    rig.add("a", num_prompt=10)
    add_fork(rig, "b")
    rig.planned(), rig.land(), rig.planned(only("b")), rig.land(), rig.plan(preempt("b"))
    saved = rig.planned(only("a")).copies
    rig.land()
    assert len(saved.saves) == 3 and not saved.forks
    second = rig.planner.requests["b"]
    assert host.num_tokens(second) == 10
    second.num_tokens, host._kept[second].num_tokens = 11, 9  # as if less had been computed when it was preempted
    plan = rig.planned()
    assert rows(plan)[1] == ("b", 10, 1, True)
    assert plan.copies.forks[0].num_tokens == 2 and not plan.copies.restores and len(host._free) == 8


def test_what_is_saved_of_a_sample_comes_before_what_it_shares(make_rig: Any) -> None:
    rig = make_rig(prefix=False, host=HostPool(8, 4, SwapCosts(1.0, 0.0, 0.0)))
    rig.add("a", num_prompt=10)
    add_fork(rig, "b")
    for _ in range(3):
        rig.planned(), rig.land()
    rig.plan(preempt("b"))
    missing: list[int] = []
    rig.plan(lambda queue, step: missing.append(step.num_missing_blocks(queue.waiting[0])))
    assert missing == [3], "all blocks that are restored are its own"
    plan = rig.planned()
    assert rows(plan)[1] == ("b", 11, 1, True) and len(plan.copies.restores) == 3 and not plan.copies.forks

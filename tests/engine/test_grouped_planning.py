"""What the planner makes of several groups: grants, edits, what schedulers hear, and how memory is divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmkit.engine.grouped_cache import GroupedCache
from llmkit.engine.memory import blocks_of_window, divide_blocks
from llmkit.engine.residency import Residency
from llmkit.interfaces.cache import CacheSpec
from llmkit.testing.invariants import check_planner
from llmkit.types import Request
from llmkit_caches.paged import PagedCache
from llmkit_caches.sharing import SharingCache
from tests.engine.conftest import Rig
from tests.engine.test_grouped_cache import build, request, run
from tests.testing.test_mutants import Bug, plant


class Stubborn(PagedCache):
    """Fails to free once, where it has a window."""

    has_failed = False

    def free(self, request: Request) -> None:
        if self.spec.window and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("not yet")
        super().free(request)


def test_a_group_that_fails_to_free_is_asked_again() -> None:
    rig = Rig(cache=build(Stubborn, prefix=False))
    rig.add("a", 12)
    rig.planned()
    rig.land()
    rig.plan(lambda queue, step: step.preempt(queue.running[0]) and None)  # type: ignore[arg-type]
    check_planner(rig.planner, [])
    assert rig.planner._residency.num_reclaiming_blocks == 3
    rig.planned()
    rig.land()
    check_planner(rig.planner, [])
    assert rig.planner._residency.num_reclaiming_blocks == 0


def test_a_prompt_runs_in_chunks_that_the_smallest_pool_holds() -> None:
    rig = Rig(cache=build(num_windowed=4), max_num_batched_tokens=64)
    rig.add("a", 40)
    starts = []
    for _ in range(4):
        starts.append(rig.planned().scheduled[0].start)
        rig.land()
    assert starts == [0, 16, 24, 32]


def test_edits_are_those_of_each_group() -> None:
    cache = build()
    rig = Rig(cache=cache, prefix=True)
    one = rig.add("a", 12)
    plan = rig.planned()
    assert plan.of_group(0) is plan and len(plan.more_edits) == 1
    for number, group in enumerate(cache.groups):
        (edit,) = plan.of_group(number).edits
        assert (edit.start, list(edit.blocks)) == (0, list(group.block_table(one)))
    rig.land()
    assert rig.planned().of_group(1).edits[0].start == 3, "a block more"
    rig.land()
    assert not rig.planned().more_edits and rig.in_flight[-1].of_group(1).edits == (), "no block, no edit"
    rig.land()


def test_a_request_that_begins_behind_a_prefix_sends_what_each_group_holds() -> None:
    cache = build()
    rig = Rig(cache=cache)
    cache.free(run(cache, request("z", 24)))
    rig.add("a", 24)
    plan = rig.planned()
    assert [row.start for row in plan.scheduled] == [20]
    assert [edit.start for number in (0, 1) for edit in plan.of_group(number).edits] == [0, 3]
    rig.land()


def test_schedulers_hear_of_the_group_that_is_short() -> None:
    """As many blocks more than are free are missing as the windowed group lacks: no scheduler starts such a request."""
    rig = Rig(cache=build(num_blocks=16, num_windowed=4, prefix=False), max_num_batched_tokens=4)
    rig.add("a", 12)
    rig.add("b", 30)
    seen = []

    def first_only(queue: Any, step: Any) -> None:
        seen.append([step.num_missing_blocks(view) - step.num_free_blocks for view in queue.waiting])
        step.run([*queue.running, *queue.waiting][0], 4)

    for _ in range(3):
        rig.plan(first_only)
        rig.land()
    # Of "b" a window of six and a step of four take four blocks at most; "a" holds one to three of four.
    assert seen == [[-1, 0], [1], [2]]


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("block_size", [1, 4, 5])
def test_a_decoding_request_holds_no_more_than_its_window_takes(window: int, block_size: int) -> None:
    """Released where a block becomes full, as while steps repeat, at the latest."""
    cache = PagedCache(PagedCache.Settings(prefix=False), CacheSpec(99, block_size, window))
    one, most = request("a", 90), 0
    for position in range(90):
        assert cache.allocate(one, position + 1)
        most = max(most, cache.stats().num_used_blocks)
        if (position + 1) % block_size == 0:
            cache.commit(one, position + 1)
    assert most <= blocks_of_window(window, block_size) <= most + 1


@pytest.mark.parametrize(
    ("num_blocks", "useful", "wanted", "block_bytes", "sizes"),
    [
        (100, 999, [30], [1, 1], [170, 30]),  # what one saves the other gets
        (100, 150, [30], [1, 1], [150, 30]),  # as far as it is useful
        (100, 999, [300], [1, 1], [100, 100]),  # nobody has less than without groups
        (100, 50, [30], [1, 1], [100, 30]),  # the asked number is never cut
        (100, 999, [30], [1, 5], [450, 30]),  # five windowed layers for each full one
        (100, 999, [30], [3, 1], [123, 30]),
        (10, 999, [3, 20], [1, 2, 2], [24, 3, 10]),
    ],
)
def test_what_windows_save_goes_to_the_group_that_sees_all(
    num_blocks: int, useful: int, wanted: list[int], block_bytes: list[int], sizes: list[int]
) -> None:
    assert divide_blocks(num_blocks, useful, wanted, block_bytes) == sizes
    taken = sum(size * each for size, each in zip(sizes, block_bytes, strict=True))
    assert taken <= num_blocks * sum(block_bytes)


def test_the_kinds_that_can_be_grouped_say_so() -> None:
    assert SharingCache.is_groupable and not GroupedCache.is_groupable


BUGS: dict[str, tuple[Bug, Callable[[], None]]] = {
    "the first group comes back first": (
        (GroupedCache.free, "reversed(self.groups)", "self.groups"), test_a_group_that_fails_to_free_is_asked_again),
    "schedulers hear of the first group only": (
        (Residency.num_missing_blocks, "if not others:", "if True:"),
        test_schedulers_hear_of_the_group_that_is_short),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_these_tests_bite(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, check = BUGS[bug]
    plant(monkeypatch, planted)
    with pytest.raises(AssertionError):
        check()

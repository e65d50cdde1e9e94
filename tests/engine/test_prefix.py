"""How the planner deals with tokens that are cached already: starts, preemption, what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.types import FinishReason, RequestStatus, StepPlan


def rows(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(row.request_id, row.start, row.num_tokens, row.samples) for row in plan.scheduled]


def test_a_request_starts_behind_what_is_cached(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    first = rig.add("a", num_prompt=9)
    rig.planned(), rig.land()
    second = rig.add("b", num_prompt=11)
    plan = rig.planned()
    assert rows(plan) == [("a", 9, 1, True), ("b", 8, 3, True)]
    assert second.num_cached_tokens == second.num_computed_tokens == 8 and first.num_cached_tokens == 0
    (edit,) = [edit for edit in plan.edits if edit.slot == second.slot]
    assert edit.start == 0 and edit.blocks[:2] == tuple(rig.allocator.block_table(first))[:2]


def test_only_what_has_landed_is_reused(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    rig.add("a", num_prompt=9)
    rig.planned()
    rig.add("b", num_prompt=9)
    assert rows(rig.planned())[1] == ("b", 0, 9, True), "its beginning is still in flight"


def test_after_a_preemption_a_request_reuses_what_it_computed_itself(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    request = rig.add("a", num_prompt=10)
    rig.planned(), rig.land()
    freed: list[int] = []
    rig.plan(lambda queue, step: freed.append(step.preempt(queue.running[0])))
    assert freed == [3] and rig.allocator.stats().num_cached_blocks == 2
    assert rows(rig.planned()) == [("a", 8, 3, True)]
    assert (request.num_preemptions, request.num_recomputed_tokens, request.num_cached_tokens) == (1, 2, 0)


def test_a_request_that_is_preempted_before_it_is_computed_loses_nothing(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    request = rig.add("a", num_prompt=10)

    def start_and_preempt(queue: Any, step: Any) -> None:
        step.run(queue.waiting[0], 10)
        assert step.preempt(queue.waiting[0]) == 3

    assert rig.plan(start_and_preempt) is None
    assert request.status is RequestStatus.PREEMPTED
    assert rows(rig.planned()) == [("a", 0, 10, True)] and request.num_recomputed_tokens == 0


@pytest.mark.parametrize("num_used", [0, 1])
def test_what_is_missing_counts_reused_blocks_unless_somebody_uses_them(make_rig: Any, num_used: int) -> None:
    rig = make_rig(prefix=True)
    rig.add("a", num_prompt=9)
    rig.planned(), rig.land()
    if not num_used:
        rig.planner.finish(rig.planner.requests["a"], FinishReason.STOP)
    rig.add("b", num_prompt=11)
    seen: list[tuple[int, int]] = []
    rig.plan(lambda queue, step: seen.append((step.num_missing_blocks(queue.waiting[0]), step.num_free_blocks)))
    assert seen == [(1, 5) if num_used else (3, 8)]


def test_preempting_tells_the_blocks_that_nobody_else_uses(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    rig.add("a", num_prompt=9)
    rig.planned(), rig.land()
    rig.add("b", num_prompt=9)
    rig.planned(), rig.land()
    freed: list[int] = []
    rig.plan(lambda queue, step: freed.extend(step.preempt(view) for view in list(queue.running)))
    assert freed == [1, 3]


def test_a_scheduler_that_raises_gives_reused_blocks_back(make_rig: Any) -> None:
    rig = make_rig(prefix=True)
    rig.add("a", num_prompt=9)
    rig.planned(), rig.land()
    rig.planner.finish(rig.planner.requests["a"], FinishReason.STOP)
    rig.add("b", num_prompt=9)

    def start_and_raise(queue: Any, step: Any) -> None:
        step.run(queue.waiting[0], 9)
        assert rig.allocator.stats().num_used_blocks == 3
        raise KeyError("trouble")

    with pytest.raises(KeyError):
        rig.plan(start_and_raise)
    assert rig.allocator.stats().num_cached_blocks == 2 and rig.allocator.stats().num_used_blocks == 0
    assert rows(rig.planned()) == [("b", 8, 1, True)]

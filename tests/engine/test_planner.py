"""The state machine: what a plan says, what landing changes, what never happens."""

from typing import Any

import pytest

from llmkit.errors import RequestError
from llmkit.types import FinishReason, RequestStatus

Rig = Any


def rows(plan: Any) -> list[tuple[str, int, int, bool]]:
    return [(row.request_id, row.start, row.num_tokens, row.samples) for row in plan.scheduled]


def test_a_first_step_hands_over_everything_the_device_must_know(rig: Rig) -> None:
    request = rig.add("a", num_prompt=6, seed=3)
    plan = rig.planned()
    (row,), (admission,), (edit,) = plan.scheduled, plan.admissions, plan.edits
    assert (row.request_id, row.slot, row.start, row.num_tokens, row.samples) == ("a", request.slot, 0, 6, True)
    assert (admission.slot, admission.token_ids, admission.seed) == (request.slot, (0, 1, 2, 3, 4, 5), 3)
    assert (edit.slot, edit.start, edit.blocks) == (request.slot, 0, tuple(rig.allocator.block_table(request)))
    assert len(edit.blocks) == 2 and plan.num_tokens == 6


def test_a_decode_is_one_token_and_sends_blocks_only_when_they_grow(rig: Rig) -> None:
    rig.add("a", num_prompt=7)
    rig.planned()
    rig.land()
    plan = rig.planned()
    assert rows(plan) == [("a", 7, 1, True)] and not plan.edits and not plan.admissions
    rig.land()
    plan = rig.planned()
    assert rows(plan) == [("a", 8, 1, True)] and plan.edits[0].start == 2 and len(plan.edits[0].blocks) == 1


def test_only_the_last_chunk_of_a_prompt_samples(rig: Rig) -> None:
    rig.add("a", num_prompt=7)
    seen = []
    for _ in range(3):
        seen += rows(rig.planned(lambda queue, step: step.run([*queue.running, *queue.waiting][0], 3)))
        rig.land()
    assert seen == [("a", 0, 3, False), ("a", 3, 3, False), ("a", 6, 1, True)]


def test_planning_ahead_counts_what_is_in_flight(rig: Rig) -> None:
    request = rig.add("a", num_prompt=4)
    assert rows(rig.planned()) == [("a", 0, 4, True)]
    assert rows(rig.planned()) == [("a", 4, 1, True)]
    assert rows(rig.planned()) == [("a", 5, 1, True)]
    assert (request.num_computed_tokens, request.num_in_flight_tokens, request.num_pending_samples) == (0, 6, 3)
    rig.land()
    assert (request.num_computed_tokens, request.num_in_flight_tokens, request.num_pending_samples) == (4, 2, 2)


def test_nothing_runs_past_the_full_length(rig: Rig) -> None:
    rig.add("a", num_prompt=4, max_tokens=2)
    assert [rig.planned().num_tokens, rig.planned().num_tokens] == [4, 1]
    assert rig.plan() is None


def test_step_ids_count_launched_steps(rig: Rig) -> None:
    assert rig.plan() is None
    rig.add("a")
    assert [rig.planned().step_id, rig.planned().step_id] == [0, 1]


def test_preempting_an_idle_request_gives_its_blocks_back_at_once(rig: Rig) -> None:
    request = rig.add("a", num_prompt=6)
    rig.planned()
    rig.land()
    freed: list[int] = []
    assert rig.plan(lambda queue, step: freed.append(step.preempt(queue.running[0]))) is None
    assert freed == [2] and rig.num_free_blocks == 8
    assert request.status is RequestStatus.PREEMPTED and request.slot == -1
    assert request.token_ids == [0, 1, 2, 3, 4, 5, 0], "what was sampled is kept"
    assert rows(rig.planned()) == [("a", 0, 7, True)], "and computed again with the prompt"
    assert (request.num_preemptions, request.num_recomputed_tokens) == (1, 6)


def test_blocks_and_slot_wait_for_the_last_step_in_flight(make_rig: Any) -> None:
    rig = make_rig(max_num_seqs=1)
    rig.add("a", num_prompt=6)
    rig.planned(), rig.planned()
    seen: list[tuple[int, int, int, int]] = []

    def preempt(queue: Any, step: Any) -> None:
        freed = step.preempt(queue.running[0])
        seen.append((freed, step.num_reclaiming_blocks, step.num_free_blocks, step.num_free_seqs))

    assert rig.plan(preempt) is None
    assert seen == [(0, 2, 6, 0)]
    assert rig.land() == [None] and rig.num_free_blocks == 6
    assert rig.plan() is None, "its blocks are still named by the second step"
    assert rig.land() == [None] and rig.num_free_blocks == 8
    assert rows(rig.planned()) == [("a", 0, 6, True)]


def test_a_result_of_an_earlier_stay_is_dropped(rig: Rig) -> None:
    """Depth 2: preempted and launched again elsewhere before the old step is read."""
    request = rig.add("a", num_prompt=4)
    old = rig.planned()
    rig.plan(lambda queue, step: step.preempt(queue.running[0]))
    rig.land()
    new = rig.planned()
    assert new.scheduled[0].epoch != old.scheduled[0].epoch
    assert rig.planner.land(old) == [None]
    assert request.num_in_flight_tokens == 4


def test_preempting_a_granted_request_takes_its_grant_back(make_rig: Any) -> None:
    rig = make_rig(max_num_batched_tokens=10)
    rig.add("a", num_prompt=4), rig.add("b", num_prompt=6)
    rig.planned()
    rig.land()
    left: list[int] = []

    def script(queue: Any, step: Any) -> None:
        run_everyone = [step.run(view, 100) for view in queue.running]
        assert len(run_everyone) == 2
        step.preempt(queue.running[0])
        left.append(step.num_free_tokens)

    assert rows(rig.planned(script)) == [("b", 6, 1, True)]
    assert left == [9]


def test_preempting_an_admitted_request_leaves_it_where_it_waited(rig: Rig) -> None:
    rig.add("a"), rig.add("b")

    def script(queue: Any, step: Any) -> None:
        for view in queue.waiting:
            step.run(view, 100)
        assert step.preempt(queue.waiting[1]) == 1
        assert step.run(queue.waiting[1], 100).reason.name == "NO_BLOCKS", "not twice in one step"

    plan = rig.planned(script)
    assert rows(plan) == [("a", 0, 4, True)] and [a.request_id for a in plan.admissions] == ["a"]
    assert rig.num_free_blocks == 7
    assert rows(rig.planned())[1] == ("b", 0, 4, True)


def test_preempted_requests_wait_first_and_in_order(rig: Rig) -> None:
    for name in "abc":
        rig.add(name)
    rig.planned()
    rig.land()
    rig.add("d")
    rig.plan(lambda queue, step: [step.preempt(view) for view in reversed(queue.running)])
    seen: list[list[str]] = []
    rig.plan(lambda queue, step: seen.append([view.request_id for view in queue.waiting]))
    assert seen == [["a", "b", "c", "d"]]


def test_queues_do_not_move_while_a_scheduler_reads_them(rig: Rig) -> None:
    for name in "abc":
        rig.add(name)

    def script(queue: Any, step: Any) -> None:
        for view in queue.waiting:
            step.run(view, 100)
        assert len(queue.waiting) == 3 and not queue.running

    assert len(rig.planned(script).scheduled) == 3


def test_duplicate_ids_are_refused_while_the_first_lives(rig: Rig) -> None:
    first = rig.add("a")
    with pytest.raises(RequestError, match="'a' is in use"):
        rig.add("a")
    assert rig.planner.requests == {"a": first} and rig.planner.num_waiting == 1
    rig.planner.finish(first, FinishReason.ABORT)
    rig.add("a")


def test_a_reused_id_is_another_request_even_with_the_first_in_flight(rig: Rig) -> None:
    first = rig.add("a", num_prompt=5)
    rig.planned()
    rig.planner.finish(first, FinishReason.ABORT)
    second = rig.add("a", num_prompt=9)
    assert rig.plan() is None, "the allocator still holds blocks under that name"
    assert rig.land() == [None]
    assert second.num_computed_tokens == 0 and rig.num_free_blocks == 8
    assert rows(rig.planned()) == [("a", 0, 9, True)]
    assert rig.land() == ["a"]


@pytest.mark.parametrize("num_steps_in_flight", [0, 1, 2])
def test_finishing_at_any_moment_brings_everything_back(rig: Rig, num_steps_in_flight: int) -> None:
    request, other = rig.add("a", num_prompt=6), rig.add("b", num_prompt=3)
    for _ in range(num_steps_in_flight):
        rig.planned()
    rig.planner.finish(request, FinishReason.ABORT)
    assert request.status is RequestStatus.FINISHED and request.finish_reason is FinishReason.ABORT
    assert rig.num_free_blocks == (5 if num_steps_in_flight else 8), "none comes back before the steps have landed"
    while rig.in_flight:
        assert rig.land() == [None, "b"]
    assert rig.num_free_blocks == 8 - other.num_blocks


def test_finishing_a_preempted_request(rig: Rig) -> None:
    request = rig.add("a")
    rig.planned()
    rig.plan(lambda queue, step: step.preempt(queue.running[0]))
    rig.planner.finish(request, FinishReason.ABORT)
    assert rig.num_free_blocks == 7
    rig.land()
    assert rig.num_free_blocks == 8 and not rig.planner.requests


def test_slots_held_but_not_written_are_counted(rig: Rig) -> None:
    rig.add("a", num_prompt=6)
    rig.planned()
    assert rig.planner.num_unwritten_slots == 2

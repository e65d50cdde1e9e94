"""The transactional step: every way a scheduler can act, and every way it can act wrongly."""

from typing import Any

import pytest

from llmkit.errors import PluginError
from llmkit.interfaces.scheduler import DenialReason, Denied, Grant, RequestView
from llmkit.types import FinishReason, RequestStatus

Rig = Any


def outcome_of(rig: Rig, max_tokens: int, name: str = "a") -> Grant | Denied:
    """What `step.run` says about request `name` in a step of its own."""
    outcomes: list[Grant | Denied] = []

    def script(queue: Any, step: Any) -> None:
        view = next(view for view in [*queue.running, *queue.waiting] if view.request_id == name)
        outcomes.append(step.run(view, max_tokens))

    rig.plan(script)
    return outcomes[0]


def test_grants_are_clipped_to_what_there_is(make_rig: Any) -> None:
    rig = make_rig(max_num_batched_tokens=5)
    rig.add("a", num_prompt=9)
    assert outcome_of(rig, 1 << 60) == Grant(5)
    assert outcome_of(rig, 1 << 60) == Grant(4)
    assert outcome_of(rig, 1 << 60) == Grant(1)


@pytest.mark.parametrize("max_tokens", [0, -1, -(1 << 60)])
@pytest.mark.parametrize("is_running", [False, True])
def test_no_tokens_are_no_work(rig: Rig, max_tokens: int, is_running: bool) -> None:
    rig.add("a")
    if is_running:
        rig.planned()
    assert outcome_of(rig, max_tokens) == Denied(DenialReason.NO_WORK)
    assert rig.num_free_blocks == 8 - is_running


def test_a_second_run_in_one_step_is_no_work(rig: Rig) -> None:
    rig.add("a", num_prompt=8)
    outcomes: list[object] = []

    def twice(queue: Any, step: Any) -> None:
        view = [*queue.running, *queue.waiting][0]
        outcomes.extend((step.run(view, 2), step.run(view, 2), step.num_free_tokens))

    assert rig.planned(twice).num_tokens == 2
    assert rig.planned(twice).num_tokens == 2
    assert outcomes == [Grant(2), Denied(DenialReason.NO_WORK), 2046] * 2


def test_the_step_budget_is_kept(make_rig: Any) -> None:
    rig = make_rig(max_num_batched_tokens=5)
    rig.add("a"), rig.add("b"), rig.add("c")
    assert [row.num_tokens for row in rig.planned().scheduled] == [4, 1]
    assert outcome_of(rig, 1, "c") == Grant(1)

    rig.add("d")

    def exhaust(queue: Any, step: Any) -> None:
        assert step.run(queue.running[1], 3) == Grant(3)
        assert step.run(queue.running[0], 1) == Grant(1) and step.run(queue.running[2], 9) == Grant(1)
        assert step.run(queue.waiting[0], 1) == Denied(DenialReason.NO_TOKENS)

    assert rig.planned(exhaust).num_tokens == 5


def test_running_requests_hear_that_the_budget_is_spent(make_rig: Any) -> None:
    rig = make_rig(max_num_batched_tokens=2)
    rig.add("a", num_prompt=6), rig.add("b", num_prompt=2)
    rig.planned()
    assert outcome_of(rig, 2, "b") == Grant(2)
    heard: list[object] = []
    rig.planned(lambda queue, step: heard.extend(step.run(view, 9) for view in queue.running))
    assert heard == [Grant(2), Denied(DenialReason.NO_TOKENS)]


def test_the_number_of_sequences_is_kept(make_rig: Any) -> None:
    rig = make_rig(max_num_seqs=1)
    rig.add("a"), rig.add("b")
    assert len(rig.planned().scheduled) == 1
    assert outcome_of(rig, 1, "b") == Denied(DenialReason.NO_SEQS)


def test_a_denial_for_want_of_blocks_changes_nothing(make_rig: Any) -> None:
    rig = make_rig(num_blocks=2)
    first = rig.add("a", num_prompt=4)
    rig.planned()
    second = rig.add("b", num_prompt=5)
    assert outcome_of(rig, 99, "b") == Denied(DenialReason.NO_BLOCKS)
    assert (rig.num_free_blocks, second.status, second.slot) == (1, RequestStatus.WAITING, -1)
    assert outcome_of(rig, 4, "b") == Grant(4), "a smaller piece fits"
    rig.land()
    assert outcome_of(rig, 99, "a") == Denied(DenialReason.NO_BLOCKS)
    assert (first.num_blocks, first.num_in_flight_tokens) == (1, 0)


def test_what_an_empty_cache_cannot_hold_never_fits(make_rig: Any) -> None:
    rig = make_rig(num_blocks=2)
    rig.add("a", num_prompt=9)
    assert outcome_of(rig, 99) == Denied(DenialReason.NEVER_FITS)


def test_rejected_requests_come_back_with_their_reason(rig: Rig) -> None:
    request = rig.add("a")

    def script(queue: Any, step: Any) -> None:
        step.reject(queue.waiting[0], "no such luck")
        assert step.run(queue.waiting[0], 1) == Denied(DenialReason.NO_WORK)

    assert rig.plan(script) is None
    assert rig.rejected == {request: "no such luck"}


def test_a_request_can_be_preempted_and_then_rejected(rig: Rig) -> None:
    request = rig.add("a")
    rig.planned()

    def script(queue: Any, step: Any) -> None:
        view = queue.running[0]
        step.preempt(view)
        step.reject(view, "enough")

    assert rig.plan(script) is None and rig.rejected == {request: "enough"}
    rig.planner.finish(request, FinishReason.ERROR, "enough")
    rig.land()
    assert rig.num_free_blocks == 8


def test_rejecting_a_running_request_is_an_error_of_the_plugin(rig: Rig) -> None:
    rig.add("a")
    rig.planned()
    with pytest.raises(PluginError, match="'a' is running"):
        rig.plan(lambda queue, step: step.reject(queue.running[0], "why not"))


def test_ended_requests_can_be_neither_run_nor_preempted_nor_rejected(rig: Rig) -> None:
    request = rig.add("a")
    views: list[RequestView] = []
    rig.plan(lambda queue, step: views.append(queue.waiting[0]))
    rig.planner.finish(request, FinishReason.ABORT)

    def script(queue: Any, step: Any) -> None:
        assert step.run(views[0], 5) == Denied(DenialReason.NO_WORK)
        assert step.preempt(views[0]) == 0
        step.reject(views[0], "too late")

    assert rig.plan(script) is None and not rig.rejected and rig.num_free_blocks == 8


def test_preempting_what_waits_does_nothing(rig: Rig) -> None:
    request = rig.add("a")
    assert rig.plan(lambda queue, step: step.preempt(queue.waiting[0])) is None
    assert request.status is RequestStatus.WAITING and not request.num_preemptions


@pytest.mark.parametrize("action", [lambda s, v: s.run(v, 1), lambda s, v: s.preempt(v), lambda s, v: s.reject(v, "x")])
@pytest.mark.parametrize("is_running", [False, True])
def test_a_step_that_is_over_refuses_every_action(rig: Rig, action: Any, is_running: bool) -> None:
    rig.add("a")
    if is_running:
        rig.planned()
    kept: list[Any] = []
    rig.plan(lambda queue, step: kept.append((step, [*queue.running, *queue.waiting][0])))
    with pytest.raises(PluginError, match="closed"):
        action(*kept[0])


class Trouble(Exception):
    pass


def test_a_scheduler_that_raises_leaves_nothing_behind(rig: Rig) -> None:
    running = rig.add("a")
    rig.planned()
    rig.land()
    waiting = rig.add("b", num_prompt=6)

    def script(queue: Any, step: Any) -> None:
        assert step.run(queue.running[0], 1) == Grant(1) and step.run(queue.waiting[0], 6) == Grant(6)
        raise Trouble

    with pytest.raises(Trouble):
        rig.plan(script)
    assert (waiting.status, waiting.slot, waiting.num_blocks) == (RequestStatus.WAITING, -1, 0)
    assert running.num_in_flight_tokens == 0
    assert [row.num_tokens for row in rig.planned().scheduled] == [1, 6], "the next step starts from there"


def test_what_was_preempted_before_the_trouble_stays_preempted(rig: Rig) -> None:
    request = rig.add("a")
    rig.planned()
    rig.land()

    def preempt(queue: Any, step: Any) -> None:
        step.preempt(queue.running[0])
        raise Trouble

    with pytest.raises(Trouble):
        rig.plan(preempt)
    assert request.status is RequestStatus.PREEMPTED and rig.num_free_blocks == 8

    def readmit(queue: Any, step: Any) -> None:
        step.run(queue.waiting[0], 9)
        raise Trouble

    with pytest.raises(Trouble):
        rig.plan(readmit)
    assert request.status is RequestStatus.PREEMPTED and rig.num_free_blocks == 8


def test_views_show_lengths_and_cannot_be_written(rig: Rig) -> None:
    rig.add("a", num_prompt=6, priority=2, tenant="t", length_hint=3, deadline=9.0, arrival_time=1.5)
    seen: list[RequestView] = []
    rig.planned(lambda queue, step: seen.append(queue.waiting[0]) or step.run(queue.waiting[0], 4))
    view = seen[0]
    assert (view.num_prompt_tokens, view.num_tokens, view.max_num_tokens, view.num_output_tokens) == (6, 6, 14, 0)
    assert (view.num_computed_tokens, view.num_in_flight_tokens, view.num_runnable_tokens) == (0, 4, 2)
    assert (view.num_blocks, view.num_service_tokens, view.num_preemptions) == (1, 4, 0)
    assert (view.priority, view.tenant, view.length_hint, view.deadline, view.arrival_time) == (2, "t", 3, 9.0, 1.5)
    assert "'a'" in repr(view) and not hasattr(view, "token_ids")
    with pytest.raises(AttributeError):
        view.priority = 0  # type: ignore[misc]

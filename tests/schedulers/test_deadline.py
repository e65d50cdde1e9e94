"""Who is due first goes first; what cannot end in time is refused before it ever ran, and nothing else is."""

from typing import Any

import pytest

from llmkit import DenialReason
from llmkit_schedulers.deadline import Deadline


def test_the_earliest_deadline_goes_first_and_none_means_an_implied_one(make_stage: Any) -> None:
    stage = make_stage(Deadline, max_num_seqs=1, implied_seconds=50.0)
    for name, deadline in (("late", 90.0), ("none", None), ("soon", 20.0), ("none2", None)):
        stage.add(name, max_tokens=1, deadline=deadline)
    assert [list(step) for step in stage.steps()] == [["soon"], ["none"], ["none2"], ["late"]]


def test_who_runs_is_not_displaced(make_stage: Any) -> None:
    stage = make_stage(Deadline, max_num_seqs=1)
    stage.add("lax", max_tokens=9, deadline=90.0)
    stage.step()
    stage.add("urgent", max_tokens=1, deadline=20.0)
    stage.steps()
    assert stage.ended["lax"] < stage.ended["urgent"] and stage.num_preemptions == {"lax": 0, "urgent": 0}


def test_whoever_is_due_last_gives_way_when_blocks_run_out(make_stage: Any) -> None:
    stage = make_stage(Deadline, num_blocks=5)
    stage.add("lax", num_prompt=6, max_tokens=10, deadline=90.0), stage.step()
    stage.add("urgent", num_prompt=6, max_tokens=10)
    stage.steps()
    assert stage.num_preemptions == {"lax": 1, "urgent": 0}


@pytest.mark.parametrize("depth", [0, 1])
def test_what_would_end_too_late_is_refused_when_its_turn_comes(make_stage: Any, depth: int) -> None:
    """One second a step: 8 tokens from now on fit before a deadline in 20 seconds, 30 do not."""
    stage = make_stage(Deadline, max_num_seqs=2, depth=depth)
    stage.add("first", max_tokens=9)
    stage.step(), stage.step(), stage.step()
    due = stage.clock.now() + 20.0
    stage.add("long", max_tokens=30, deadline=due), stage.add("short", max_tokens=8, deadline=due)
    stage.add("hinted", max_tokens=30, length_hint=8, deadline=due), stage.add("endless", max_tokens=30)
    stage.steps()
    assert stage.errors.keys() == {"long"}
    assert stage.errors["long"].startswith(f"{DenialReason.TOO_LATE.value}: ")
    assert stage.ended["short"] <= due


def test_a_hint_beyond_what_a_request_may_produce_refuses_nobody(make_stage: Any) -> None:
    stage = make_stage(Deadline)
    stage.add("first", max_tokens=9)
    stage.step(), stage.step()
    stage.add("hinted", max_tokens=4, length_hint=1000, deadline=stage.clock.now() + 10.0)
    stage.steps()
    assert not stage.errors


def test_caution_refuses_earlier(make_stage: Any) -> None:
    def refused(caution: float, deadline: float) -> bool:
        stage = make_stage(Deadline, caution=caution)
        stage.add("first", max_tokens=9)
        stage.step(), stage.step()
        stage.add("second", max_tokens=8, deadline=stage.clock.now() + deadline)
        stage.steps()
        return "second" in stage.errors

    assert [refused(caution, 12.0) for caution in (0.0, 1.0, 2.0)] == [False, False, True]
    assert [refused(0.0, deadline) for deadline in (1.0, -1.0)] == [False, True]


def test_nobody_who_ever_ran_is_refused(make_stage: Any) -> None:
    """`lax` is preempted, and its deadline passes while it waits to run again."""
    stage = make_stage(Deadline, num_blocks=4)
    (
        stage.add("lax", num_prompt=6, max_tokens=8, deadline=9.0),
        stage.add("urgent", num_prompt=6, max_tokens=8, deadline=8.5),
    )
    stage.steps()
    assert stage.num_preemptions == {"lax": 1, "urgent": 0} and not stage.errors
    assert stage.ended["lax"] > 9.0


def test_idle_time_is_not_taken_for_a_slow_step(make_stage: Any) -> None:
    stage = make_stage(Deadline)
    stage.add("first", max_tokens=4)
    stage.steps()
    stage.clock.advance(1000.0)
    stage.add("second", max_tokens=8, deadline=stage.clock.now() + 12.0)
    stage.steps()
    assert not stage.errors

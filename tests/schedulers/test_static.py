"""A batch runs until its last request ends."""

from typing import Any

import pytest

from llmkit_schedulers.static import Static


@pytest.mark.parametrize("depth", [0, 1])
def test_nobody_joins_before_the_last_of_the_batch_has_ended(make_stage: Any, depth: int) -> None:
    stage = make_stage(Static, max_num_seqs=2, depth=depth)
    (
        stage.add("a", max_tokens=2),
        stage.add("b", max_tokens=5),
        stage.add("c", max_tokens=2),
        stage.add("d", max_tokens=1),
    )
    batches = [set(step) for step in stage.steps() if step]
    first = [batch for batch in batches if batch & {"a", "b"}]
    assert first == batches[: len(first)] and len(first) == 5
    assert all(batch <= {"a", "b"} for batch in first)
    assert batches[len(first)] == {"c", "d"}


def test_who_arrives_while_the_batch_runs_waits(make_stage: Any) -> None:
    stage = make_stage(Static)
    stage.add("a", max_tokens=4)
    stage.step()
    stage.add("late", max_tokens=1)
    assert [list(step) for step in stage.steps()] == [["a"], ["a"], ["a"], ["late"]]


def test_a_batch_is_filled_over_several_steps_if_its_prompts_are_long(make_stage: Any) -> None:
    stage = make_stage(Static, max_num_batched_tokens=6)
    stage.add("a", num_prompt=10, max_tokens=3), stage.add("b", num_prompt=2, max_tokens=3)
    assert [stage.step() for _ in range(2)] == [{"a": 6}, {"a": 4, "b": 2}]

"""Urgent requests first, displacement, and ageing: nobody starves."""

from typing import Any

import pytest

from llmkit.interfaces.cache import CacheSpec
from llmkit.testing.simulation import simulate
from llmkit.types import Request, RequestStatus, SamplingParams
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.priority import Priority


def test_the_most_urgent_start_first_and_ties_go_by_arrival(make_stage: Any) -> None:
    stage = make_stage(Priority, max_num_seqs=1)
    for at, (name, priority) in enumerate([("low", 3), ("high", 0), ("mid", 1), ("high2", 0)]):
        stage.add(name, max_tokens=1, priority=priority, arrival_time=at / 10)
    assert [list(step) for step in stage.steps()] == [["high"], ["high2"], ["mid"], ["low"]]


def test_an_urgent_newcomer_takes_the_place_of_the_least_urgent(make_stage: Any) -> None:
    stage = make_stage(Priority, max_num_seqs=2)
    stage.add("low", max_tokens=6, priority=2), stage.add("mid", max_tokens=6, priority=1)
    stage.step()
    stage.add("high", max_tokens=2, priority=0)
    assert list(stage.step()) == ["mid", "high"]
    stage.steps()
    assert stage.num_preemptions == {"low": 1, "mid": 0, "high": 0}
    assert max(stage.ended, key=stage.ended.__getitem__) == "low"


def test_an_urgent_newcomer_takes_blocks_too(make_stage: Any) -> None:
    stage = make_stage(Priority, num_blocks=4)
    stage.add("low", num_prompt=8, max_tokens=8, priority=2)
    stage.step()
    stage.add("high", num_prompt=12, max_tokens=2, priority=0)
    assert list(stage.step()) == ["high"]


def test_equals_do_not_displace_each_other(make_stage: Any) -> None:
    stage = make_stage(Priority, max_num_seqs=1)
    stage.add("first", max_tokens=4, priority=1)
    stage.step()
    stage.add("second", max_tokens=1, priority=1)
    stage.steps()
    assert stage.num_preemptions == {"first": 0, "second": 0} and stage.ended["first"] < stage.ended["second"]


def test_the_least_urgent_gives_way_when_blocks_run_out(make_stage: Any) -> None:
    stage = make_stage(Priority, num_blocks=4)
    stage.add("low", num_prompt=6, max_tokens=8, priority=1), stage.add("high", num_prompt=6, max_tokens=8, priority=0)
    stage.steps()
    assert stage.num_preemptions == {"low": 1, "high": 0}


@pytest.mark.parametrize("depth", [0, 1])
def test_ageing_lets_nobody_starve(make_stage: Any, depth: int) -> None:
    """An urgent request arrives every other second, for ever; each keeps the only place for two."""
    stage = make_stage(Priority, max_num_seqs=1, ageing_seconds=10.0, depth=depth)
    stage.add("patient", max_tokens=2, priority=3)
    for number in range(60):
        stage.add(f"urgent{number}", max_tokens=2, priority=0)
        stage.step(), stage.step()
        if "patient" in stage.ended:
            break
    # Its three levels are worth 30 seconds: whoever arrived before that is served first, nobody else.
    assert 30 <= stage.ended["patient"] <= 30 * (1 + 2 * depth) + 10


def test_without_enough_ageing_the_urgent_keep_going_first(make_stage: Any) -> None:
    stage = make_stage(Priority, max_num_seqs=1, ageing_seconds=1000.0)
    stage.add("patient", max_tokens=2, priority=3)
    for number in range(60):
        stage.add(f"urgent{number}", max_tokens=2, priority=0)
        stage.step(), stage.step()
    assert "patient" not in stage.ended


def test_who_displaces_everybody_starts_in_the_same_step() -> None:
    """A prompt longer than the pool, behind a window: alone it need not have room for all of it at once."""
    cache = PagedCache(PagedCache.Settings(), CacheSpec(num_blocks=7, block_size=5, window=25))
    scheduler = Priority(Priority.Settings(max_num_batched_tokens=52))
    engine = simulate(scheduler, cache, cost=lambda plan: 1.0).engine
    engine.add(Request("patient", [0] * 20, SamplingParams(max_tokens=30), priority=5))
    engine.step()
    urgent = Request("urgent", [1] * 60, SamplingParams(max_tokens=2))
    engine.add(urgent)
    engine.step()
    assert urgent.status is RequestStatus.RUNNING

"""Few expected tokens first, by the hint or by what a request may take; nobody is put back further than the bound."""

from typing import Any

import pytest

from llmkit.engine.limits import EngineLimits
from llmkit.interfaces.cache import CacheSpec
from llmkit.testing import ReferenceCache
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import Event, Rule, World
from llmkit.types import Request, SamplingParams
from llmkit_schedulers.sjf import ShortestJobFirst


def test_few_expected_tokens_go_first_and_ties_go_by_arrival(make_stage: Any) -> None:
    stage = make_stage(ShortestJobFirst, max_num_seqs=1)
    for at, (name, hint) in enumerate([("long", 90), ("mid", 20), ("short", 5), ("mid2", 20)]):
        stage.add(name, max_tokens=1, length_hint=hint, arrival_time=at / 1000)
    assert [list(step) for step in stage.steps()] == [["short"], ["mid"], ["mid2"], ["long"]]


def test_without_a_hint_all_that_a_request_may_take_is_expected(make_stage: Any) -> None:
    stage = make_stage(ShortestJobFirst, max_num_seqs=1)
    stage.add("unknown", num_prompt=2, max_tokens=6), stage.add("hinted", num_prompt=40, max_tokens=6, length_hint=5)
    assert list(stage.step()) == ["hinted"]


def test_who_runs_is_not_displaced(make_stage: Any) -> None:
    stage = make_stage(ShortestJobFirst, max_num_seqs=1)
    stage.add("long", max_tokens=9)
    stage.step()
    stage.add("short", max_tokens=1)
    stage.steps()
    assert stage.ended["long"] < stage.ended["short"] and stage.num_preemptions == {"long": 0, "short": 0}


def test_of_equals_the_latest_gives_way(make_stage: Any) -> None:
    """If it were the first, the two would evict each other in turn."""
    stage = make_stage(ShortestJobFirst, num_blocks=5)
    stage.add("a", max_tokens=12), stage.add("b", max_tokens=12)
    stage.steps()
    assert stage.num_preemptions["a"] == 0 and stage.num_preemptions["b"] > 0


def test_the_longest_gives_way_when_blocks_run_out(make_stage: Any) -> None:
    stage = make_stage(ShortestJobFirst, num_blocks=5)
    stage.add("long", num_prompt=6, max_tokens=10, length_hint=80), stage.step()
    stage.add("short", num_prompt=6, max_tokens=10)
    stage.steps()
    assert stage.num_preemptions == {"long": 1, "short": 0}


@pytest.mark.parametrize("depth", [0, 1])
def test_the_bound_lets_nobody_starve(make_stage: Any, depth: int) -> None:
    """A short request arrives every other second, for ever; each keeps the only place for two."""
    stage = make_stage(ShortestJobFirst, max_num_seqs=1, seconds_per_token=1.0, max_seconds=20.0, depth=depth)
    stage.add("long", max_tokens=2, length_hint=1000)
    for number in range(60):
        stage.add(f"short{number}", max_tokens=2, length_hint=2)
        stage.step(), stage.step()
        if "long" in stage.ended:
            break
    # Whoever came within 18 seconds (20, less the 2 of the short ones) is served first, nobody else.
    assert 18 <= stage.ended["long"] <= 18 * (1 + 2 * depth) + 8


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("max_chunk_tokens", [1, 2, 3])
def test_equals_do_not_evict_each_other_for_ever(max_chunk_tokens: int, depth: int) -> None:
    """Their rank does not say who gives way, and their order changes whenever one comes back."""
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 21, "max_chunk_tokens": max_chunk_tokens}
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    events = [Event(0, Rule.ADD, name, Request(name, [0, 0], params)) for name in ("a", "b")]
    world = World(0, CacheSpec(10, 1), limits, events, EngineLimits(2, 10))
    scheduler = build_scheduler(ShortestJobFirst, limits, {})
    assert Walk(world, scheduler, build_cache(ReferenceCache, world.spec, {}), depth).run().num_tokens == 16

"""Whoever has most in the cache goes first, at any moment anew; nobody is passed over for longer than the bound."""

from typing import Any

import pytest

from llmkit.types import Request
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.prefix_aware import PrefixAware

KNOWN, OTHER = list(range(100, 116)), list(range(200, 216))


def test_the_longest_cached_prefix_goes_first_and_others_go_by_arrival(make_stage: Any) -> None:
    stage = make_stage(PrefixAware, max_num_seqs=1)
    stage.add("first", prompt=list(KNOWN), max_tokens=1)
    stage.steps()
    for name, prompt in (("none", OTHER), ("none2", OTHER[::-1]), ("half", KNOWN[:9]), ("whole", [*KNOWN, 1])):
        stage.add(name, prompt=list(prompt), max_tokens=1)
    assert [view.num_cached_tokens for view in stage.engine.planner._waiting] == [0, 0, 8, 16]
    assert [list(step.items()) for step in stage.steps()] == [
        [("whole", 1)],
        [("half", 1)],
        [("none", 16)],
        [("none2", 16)],
    ]


def test_what_others_compute_meanwhile_counts(make_stage: Any) -> None:
    stage = make_stage(PrefixAware, max_num_seqs=1)
    for name, prompt in (("a", KNOWN), ("b", OTHER), ("a2", KNOWN)):
        stage.add(name, prompt=list(prompt), max_tokens=1)
    assert [next(iter(step)) for step in stage.steps()] == ["a", "a2", "b"]


def test_one_that_runs_has_nothing_to_find(make_stage: Any) -> None:
    stage = make_stage(PrefixAware)
    stage.add("a", prompt=list(KNOWN), max_tokens=9), stage.step(), stage.step()
    (running,) = stage.engine.planner._running
    assert running.num_cached_tokens == 0 and stage.engine.planner.allocator.match(running._request) > 0


def test_without_prefix_caching_it_is_first_come_first_served(make_stage: Any) -> None:
    stage = make_stage(PrefixAware, max_num_seqs=1, cache_options={"prefix": False})
    for name, prompt in (("a", KNOWN), ("b", OTHER), ("a2", KNOWN)):
        stage.add(name, prompt=list(prompt), max_tokens=1)
    assert [next(iter(step)) for step in stage.steps()] == ["a", "b", "a2"]


def test_only_so_many_are_looked_up(make_stage: Any) -> None:
    stage = make_stage(PrefixAware, max_num_seqs=1, lookahead=2)
    for number, prompt in enumerate((KNOWN, OTHER, OTHER[::-1], KNOWN)):
        stage.add(f"r{number}", prompt=list(prompt), max_tokens=1)
    assert [next(iter(step)) for step in stage.steps()] == ["r0", "r1", "r3", "r2"]


@pytest.mark.parametrize("depth", [0, 1])
def test_the_bound_lets_nobody_starve(make_stage: Any, depth: int) -> None:
    """One that begins like those before it arrives every other second, for ever; each keeps the only place for two."""
    stage = make_stage(PrefixAware, max_num_seqs=1, max_wait_seconds=20.0, depth=depth)
    stage.add("known", prompt=list(KNOWN), max_tokens=2), stage.step(), stage.step()
    stage.add("patient", prompt=list(OTHER), max_tokens=2)
    for number in range(60):
        stage.add(f"known{number}", prompt=list(KNOWN), max_tokens=2)
        stage.step(), stage.step()
        if "patient" in stage.ended:
            break
    # Once its 20 seconds are over, only those go first who then had waited for longer.
    assert 20 <= stage.ended["patient"] <= 20 * (1 + 2 * depth) + 10


def test_nothing_is_looked_up_while_nobody_could_join(make_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, match = [], PagedCache.match

    def counted(cache: PagedCache, request: Request) -> int:
        looks.append(request.request_id)
        return match(cache, request)

    monkeypatch.setattr(PagedCache, "match", counted)
    stage = make_stage(PrefixAware, max_num_seqs=1)
    stage.add("long", prompt=list(KNOWN), max_tokens=30)
    for number in range(20):
        stage.add(f"r{number}", prompt=list(OTHER), max_tokens=1)
    for _ in range(4):
        stage.step()
    assert looks
    looks.clear()
    for _ in range(20):
        stage.step()
    assert "long" not in stage.ended and not looks

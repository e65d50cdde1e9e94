"""The engine as a hypothesis state machine, for every pair; what a walk finds fails there too, and shrinks."""

from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from llmkit.engine.residency import Residency
from llmkit.testing.machine import replay, walk_machine
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import Rule, draw_world
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous
from tests.nightly.volume import Pair, all_pairs

QUICK = settings(max_examples=10, stateful_step_count=25, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(("number", "pair"), list(enumerate(all_pairs())), ids=str)
def test_every_pair_keeps_its_promises(number: int, pair: Pair) -> None:
    run_state_machine_as_test(walk_machine(*pair.load(), depth=number % 3), settings=QUICK)


def failing_walk(depth: int) -> Walk:
    for seed in range(60):
        world = draw_world(seed)
        scheduler = build_scheduler(Continuous, world.scheduler_options, {})
        walk = Walk(world, scheduler, build_cache(PagedCache, world.spec, {}), depth)
        try:
            walk.run()
        except AssertionError:
            return walk
    raise LookupError("no walk fails")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks come back while a step in flight still names them."""

    def leave(self: Residency, request: Any) -> int:
        request.last_step_id = -1
        return original(self, request)

    original = Residency.leave
    monkeypatch.setattr(Residency, "leave", leave)


@pytest.mark.usefixtures("hasty")
def test_the_machine_finds() -> None:
    quick = settings(QUICK, max_examples=40, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError, match=r"Continuous on PagedCache, depth 1, seed -1, step \d+: "):
        run_state_machine_as_test(walk_machine(Continuous, PagedCache, 1), settings=quick)


@pytest.mark.usefixtures("hasty")
def test_a_walk_that_fails_replays_in_the_machine() -> None:
    walk = failing_walk(depth=1)
    with pytest.raises(AssertionError) as caught:
        replay(walk_machine(Continuous, PagedCache, 1), walk)
    again = Walk(walk.world, walk.scheduler, build_cache(PagedCache, walk.world.spec, {}), 1)
    with pytest.raises(AssertionError) as first:
        again.run()
    assert str(caught.value) == str(first.value)
    assert {event.rule for event in walk.trace} >= {Rule.ADD, Rule.STEP}


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_the_machine_finds_and_shrinks() -> None:
    """Hypothesis' smallest example of this bug has one or two short requests."""
    machine = walk_machine(Continuous, PagedCache, 1)
    patient = settings(
        QUICK,
        max_examples=60,
        stateful_step_count=12,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError, match=r"Continuous on PagedCache, depth 1, seed -1, step \d+: ") as caught:
        run_state_machine_as_test(machine, settings=patient)
    note = "\n".join(getattr(caught.value, "__notes__", []))
    assert 1 <= note.count("state.add(") <= 2, note

"""Walks notice what is wrong between steps, and everything that a world holds really happens."""

from collections import Counter
from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.engine.engine import Engine
from llmkit.interfaces.scheduler import RequestQueue, Scheduler, SchedulingStep
from llmkit.testing import ReferenceCache, check_cache, check_scheduler
from llmkit.testing.liveness import Liveness
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.walk import Walk
from llmkit.testing.worlds import Event, Rule, draw_world
from llmkit.types import Request, SamplingParams


def walk_of(seed: int, scheduler: type[Scheduler] = ContinuousBatching, depth: int = 0, cache: Any = None) -> Walk:
    world = draw_world(seed)
    built = build_scheduler(scheduler, world.scheduler_options, {})
    return Walk(world, built, build_cache(cache or ReferenceCache, world.spec, {}), depth)


def test_every_rule_is_walked() -> None:
    rules: Counter[Rule] = Counter()
    coverage = Counter[str]()
    for seed in range(60):
        walk = walk_of(seed)
        found = walk.run()
        rules.update(event.rule for event in walk.trace)
        coverage.update({name: getattr(found, name) for name in found.__slots__})
    assert min(rules[rule] for rule in Rule) > 1, rules
    assert coverage["num_refusals"] > 10 and coverage["num_aborts"] > 10, coverage


def test_requests_arrive_when_they_are_added() -> None:
    """Else who came first is another one for the scheduler's promise than for the queue."""
    added = [event for seed in range(300) for event in draw_world(seed).events if event.rule is Rule.ADD]
    late = {event.request_id for event in added if event.request and event.request.arrival_time != event.at}
    assert not late and "huge" in {event.request_id for event in added}


def test_pools_and_requests_are_as_tiny_as_they_should_be() -> None:
    worlds = [draw_world(seed) for seed in range(300)]
    assert {world.spec.num_blocks for world in worlds} == set(range(4, 25))
    assert {world.spec.block_size for world in worlds} == set(range(1, 9))
    too_long = [
        event
        for world in worlds
        for event in world.events
        if event.request and event.rule is Rule.ADD and event.request.num_prompt_tokens > world.spec.num_slots
    ]
    assert len(too_long) > 5


class Idler(ContinuousBatching):
    """Skips every seventh step, though somebody could run."""

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        if step.now % 7 != 6:
            super().schedule(queue, step)


def test_a_step_that_runs_nothing_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"nothing ran, but one of .* could"):
        check_scheduler(Idler, seeds=range(5))


def liveness_of(num_prompt: int, num_output: int) -> tuple[Liveness, Request]:
    liveness, request = Liveness(depth=0, is_strict=True), Request("a", [0] * num_prompt, SamplingParams())
    liveness.take_on(request, num_output)
    return liveness, request


def test_a_workload_must_end_in_proportion_to_its_work() -> None:
    liveness, _ = liveness_of(20, 10)
    planner = walk_of(0).engine.planner
    for _ in range(2 * 31 + 1):
        liveness.check_step(planner, [], has_launched=True, has_progress=True)
    with pytest.raises(AssertionError, match="64 steps for 31 tokens of work"):
        liveness.check_step(planner, [], has_launched=True, has_progress=True)


def test_preemptions_are_bounded_but_for_those_the_walk_forces() -> None:
    liveness, request = liveness_of(20, 11)
    request.num_preemptions = 12
    liveness.check_end(request)
    request.num_preemptions = 13
    with pytest.raises(AssertionError, match="a was preempted 13 times in 32 tokens of work"):
        liveness.check_end(request)
    liveness.force(request)
    liveness.check_end(request)


class Hoarding(ReferenceCache):
    """Keeps the last block of whoever leaves."""

    def free(self, request: Request) -> None:
        table = self._tables.get(request.request_id, [])
        super().free(request)
        if len(table) > 3:
            self._free.discard(table[-1])
            self._tables["hoard"] = [table[-1]]


class Forgetful(ReferenceCache):
    """Its census leaves somebody out."""

    def census(self) -> dict[int, tuple[str, ...]]:
        return dict.fromkeys(super().census(), ("somebody",))


class Promising(ReferenceCache):
    """Says that a token is cached which is not."""

    def match(self, request: Request) -> int:
        return 1 if request.num_tokens > 1 else 0


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Hoarding, "owns blocks|owned blocks|the census counts"),
        (Forgetful, "the census counts .*, what runs or is awaited names"),
        (Promising, "hold something else|reads a wrong KV entry|the tags at"),
    ],
)
def test_caches_that_lie_are_noticed(cache: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        for seed in range(60):
            walk_of(seed, cache=cache).run()


def test_tags_of_a_table_are_checked_though_nobody_reads_them() -> None:
    """A block of a request that waits for its turn is overwritten: the next check tells, not only the next read."""
    walk = walk_of(0)
    walk.apply(Event(0, Rule.ADD, "a", Request("a", [0, 1], SamplingParams(max_tokens=9, ignore_eos=True))))
    walk.apply(Event(0, Rule.STEP))
    (block, *_) = walk.cache.block_table(walk.engine.planner.requests["a"])
    walk.executor._kv[block][0] = (0, 0)
    with pytest.raises(AssertionError, match=r"a: the tags at \[0\] are not those of its tokens"):
        walk.apply(Event(0, Rule.PROBE, request=Request("b", [1], SamplingParams())))


def test_a_request_that_is_too_long_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.engine.engine.check_request", lambda request, limits: None)
    with pytest.raises(AssertionError, match=r"was taken with \d+ tokens"):
        check_scheduler(ContinuousBatching, caches=[ReferenceCache], depths=[0], seeds=range(60))


def test_a_reset_that_leaves_blocks_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Engine._finish

    def leaky(self: Engine, request: Request, *rest: Any) -> None:
        finish(self, request, *rest)
        self.planner._residency.num_reclaiming_blocks += 1

    monkeypatch.setattr(Engine, "_finish", leaky)
    with pytest.raises(AssertionError, match="seed"):
        check_cache(ReferenceCache, seeds=range(3))

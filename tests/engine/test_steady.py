"""Steps that repeat: the very plans and outputs that asking the scheduler for every step would give, at less cost."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress
from llmkit.errors import RequestError
from llmkit.interfaces.cache import CacheAllocator, CacheSpec
from llmkit.interfaces.clock import VirtualClock
from llmkit.rows import DecodeRows
from llmkit.testing import FakeExecutor
from llmkit.testing.schedulers import build_cache, build_scheduler
from llmkit.testing.worlds import Rule, World, draw_world
from llmkit.types import FinishReason, Request, SamplingParams, StepPlan
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.priority import Priority
from llmkit_schedulers.sjf import ShortestJobFirst
from llmkit_schedulers.static import Static


def asked(scheduler: type[ContinuousBatching]) -> type[ContinuousBatching]:
    """The same, but it wants to be asked for every step."""
    return type(f"Asked{scheduler.__name__}", (scheduler,), {"repeats": lambda self, num_waiting, num_free_seqs: False})


class Chunked(ContinuousBatching):
    """Overrides a choice, so it is asked."""

    def chunk(self, request: Any, step: Any) -> int:
        return super().chunk(request, step)


def engine_of(
    world: World, scheduler: type[ContinuousBatching], cache: type[CacheAllocator], depth: int, **options: Any
) -> Engine:
    planner = Planner(build_scheduler(scheduler, world.scheduler_options, {}), build_cache(cache, world.spec, options))
    executor = FakeExecutor(world.spec.block_size, world.limits.vocab_size, world.faults)
    return Engine(planner, executor, world.limits, VirtualClock(), depth=depth)


def play(
    world: World, scheduler: type[ContinuousBatching], cache: type[CacheAllocator], depth: int, **options: Any
) -> tuple[list[Any], int]:
    """What every step planned and brought, and how many of them repeated the one before. Nobody looks in between."""
    engine, events, seen, num_repeated = (
        engine_of(world, scheduler, cache, depth, **options),
        deque(world.events),
        [],
        0,
    )
    while events or engine.has_unfinished:
        now = int(engine.clock.now())
        while events and events[0].at <= now:
            event = events.popleft()
            one = event.request
            if event.rule is Rule.ADD and one is not None:
                one = replace(one, token_ids=list(one.token_ids))
                with suppress(RequestError):
                    engine.add(one, Progress(one, world.limits.eos_token_ids, streams=bool(one.seed % 2)))
            elif event.rule is Rule.ABORT:
                engine.abort([event.request_id])
        num_steps = engine.executor.num_steps  # type: ignore[attr-defined]
        outputs = engine.step()
        plan = engine.executor.history[-1] if engine.executor.num_steps > num_steps else None  # type: ignore[attr-defined]
        num_repeated += plan is not None and isinstance(plan.scheduled, DecodeRows)
        seen.append((_told(plan), outputs, engine.planner.allocator.stats(), engine.planner.num_running))
        engine.clock.advance(1.0)  # type: ignore[attr-defined]
        assert len(seen) < 3000, "requests evict each other for ever"
    return seen, num_repeated


def _told(plan: StepPlan | None) -> Any:
    return plan and (plan.step_id, sorted(plan.scheduled), plan.admissions, plan.edits, plan.num_tokens)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("scheduler", [ContinuousBatching, Priority, ShortestJobFirst, Static])
@pytest.mark.parametrize("cache", [PagedCache, ContiguousCache])
def test_repeated_steps_are_those_that_asking_would_give(
    scheduler: type[ContinuousBatching], cache: type[CacheAllocator], depth: int
) -> None:
    num_repeated = 0
    for seed in range(40):
        world = draw_world(seed)
        steps, num = play(world, scheduler, cache, depth)
        wanted_steps, none = play(world, asked(scheduler), cache, depth)
        assert none == 0
        assert len(steps) == len(wanted_steps)
        for number, (got, wanted) in enumerate(zip(steps, wanted_steps, strict=True)):
            assert got == wanted, f"seed {seed}, step {number}"
        num_repeated += num
    assert num_repeated > 250


def test_a_scheduler_that_makes_choices_of_its_own_is_asked() -> None:
    assert all(play(draw_world(seed), Chunked, PagedCache, 1)[1] == 0 for seed in range(10))


def steady_engine(num_requests: int = 3, **params: Any) -> Engine:
    limits = EngineLimits(50, 64, frozenset({7}))
    world = World(0, CacheSpec(24, 4), {"max_num_seqs": 8, "max_num_batched_tokens": 30}, [], limits)
    engine = engine_of(world, ContinuousBatching, PagedCache, 1)
    for number in range(num_requests):
        engine.add(Request(str(number), [1, 2], SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | params)))
    return engine


def test_counters_are_brought_up_to_date_when_somebody_looks() -> None:
    engine = steady_engine()
    request = engine.planner.requests["0"]
    for _ in range(6):
        engine.step()
    assert len(request.token_ids) == 2 + 5 and request.num_tokens < 2 + 5, "they lag behind"
    engine.planner.settle()
    assert (request.num_tokens, request.num_computed_tokens, request.num_in_flight_tokens) == (7, 6, 1)
    assert (request.num_pending_samples, request.num_service_tokens, request.last_step_id) == (1, 7, 5)
    engine.planner.settle()
    assert (request.num_tokens, request.num_computed_tokens, request.num_service_tokens) == (7, 6, 7)


def test_rows_that_decode_together_share_their_columns() -> None:
    engine = steady_engine()
    plans: list[StepPlan] = []
    for _ in range(5):
        engine.step()
        plans.append(engine.executor.history[-1])  # type: ignore[attr-defined]
    rows = [plan.scheduled for plan in plans[1:]]
    assert all(isinstance(one, DecodeRows) for one in rows)
    assert len({id(one.lineup) for one in rows if isinstance(one, DecodeRows)}) == 1
    assert [one[0].start for one in rows] == [2, 3, 4, 5]
    assert [row.request_id for row in rows[0]] == ["0", "1", "2"] and rows[0][1:] == tuple(rows[0])[1:]


def test_a_newcomer_ends_the_repetition_at_once() -> None:
    engine = steady_engine()
    for _ in range(4):
        engine.step()
    engine.add(Request("new", [1, 2, 3], SamplingParams(max_tokens=3)))
    engine.step()
    plan = engine.executor.history[-1]  # type: ignore[attr-defined]
    assert [(row.request_id, row.num_tokens) for row in plan.scheduled] == [("0", 1), ("1", 1), ("2", 1), ("new", 3)]


def test_tokens_sampled_beyond_an_end_reach_nobody() -> None:
    engine = steady_engine(stop_token_ids=tuple(range(0, 50, 5)), max_tokens=40)
    requests = dict(engine.planner.requests)
    completions = {}
    while engine.has_unfinished:
        completions |= {output.request_id: output.completion for output in engine.step()}
    for name, request in requests.items():
        completion = completions[name]
        assert completion is not None and completion.finish_reason is FinishReason.STOP
        assert tuple(request.output_token_ids) == completion.token_ids
        assert request.num_tokens == len(request.token_ids)

"""The shared mechanism, by way of the choices a plugin may override."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from llmkit.batching import ContinuousBatching
from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.errors import PluginError
from llmkit.interfaces.cache import CacheSpec
from llmkit.interfaces.scheduler import RequestQueue, RequestView, SchedulingStep
from llmkit.testing import FakeExecutor, ReferenceCache, check_scheduler
from llmkit.types import FinishReason, Request, SamplingParams


class Lifo(ContinuousBatching):
    """The last one in is the first one served."""

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return list(reversed(waiting))


class ShortestFirst(ContinuousBatching):
    """Fewest tokens left to run first; the longest gives way."""

    def order_waiting(self, waiting: Sequence[RequestView], now: float) -> Iterable[RequestView]:
        return sorted(waiting, key=lambda request: request.max_num_tokens)

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        return max(reversed(candidates), key=lambda request: request.max_num_tokens)


class LeastServiceFirst(ContinuousBatching):
    """Reorders the running ones in every step."""

    def order_running(self, running: Sequence[RequestView], now: float) -> Sequence[RequestView]:
        return sorted(running, key=lambda request: request.num_service_tokens)

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        return max(candidates, key=lambda request: (request.arrival_time, request.request_id))


class Picky(ContinuousBatching):
    """Passes over who needs more blocks than are free, and runs long prompts in small pieces."""

    def admit(self, request: RequestView, step: SchedulingStep) -> bool:
        return request.num_tokens <= 4 * step.num_free_blocks or not step.num_reclaiming_blocks

    def chunk(self, request: RequestView, step: SchedulingStep) -> int:
        return 2 if request.num_runnable_tokens > 8 else super().chunk(request, step)


class MostServedGivesWay(ContinuousBatching):
    """Fair at first sight; but who has been served most is who was about to end."""

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        return max(candidates, key=lambda request: request.num_service_tokens)


class OldestGivesWay(ContinuousBatching):
    """Preempts the first of the candidates: two requests then take turns for ever."""

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        return candidates[0]


class Outsider(ContinuousBatching):
    """Its victim is not among the candidates."""

    def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
        self.outsider = [*queue.waiting, *queue.running][0]
        super().schedule(queue, step)

    def victim(self, candidates: Sequence[RequestView], step: SchedulingStep) -> RequestView:
        return self.outsider


class NeverSatisfied(ContinuousBatching):
    """Lets every waiting request displace every running one."""

    def outranks(self, waiting: RequestView, running: RequestView) -> bool:
        return True


@pytest.mark.parametrize("scheduler", [ContinuousBatching, Lifo, ShortestFirst, LeastServiceFirst, Picky])
def test_choices_cannot_break_the_mechanism(scheduler: type[ContinuousBatching]) -> None:
    coverage = check_scheduler(scheduler, seeds=range(12))
    assert coverage.num_tokens > 1000 and coverage.num_preemptions > 50, coverage


@pytest.mark.parametrize("scheduler", [MostServedGivesWay, OldestGivesWay, NeverSatisfied])
def test_choices_that_get_nowhere_are_told_so(scheduler: type[ContinuousBatching]) -> None:
    with pytest.raises(AssertionError, match=r"steps (without a token|for \d+ tokens of work)"):
        check_scheduler(scheduler, caches=[ReferenceCache], depths=[1, 2], seeds=range(300))


def engine_of(scheduler: type[ContinuousBatching], num_blocks: int, **options: int) -> Engine:
    cache = ReferenceCache(ReferenceCache.Settings(), CacheSpec(num_blocks, 4))
    planner = Planner(scheduler(scheduler.Settings(**options)), cache)
    return Engine(planner, FakeExecutor(4, 100), EngineLimits(100, 1000))


def add(engine: Engine, name: str, num_prompt: int, max_tokens: int = 4) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request(name, [1] * num_prompt, params))


def test_a_victim_must_be_a_candidate() -> None:
    engine = engine_of(Outsider, num_blocks=4)
    for name in "ab":
        add(engine, name, num_prompt=6, max_tokens=8)
    engine.step()
    add(engine, "c", num_prompt=4)
    with pytest.raises(PluginError, match=r"Outsider.victim chose .*'c'.* which is not among the candidates"):
        for _ in range(4):
            engine.step()


def test_what_never_fits_is_rejected_and_the_others_go_on() -> None:
    engine = engine_of(ContinuousBatching, num_blocks=2)
    add(engine, "huge", num_prompt=9)
    add(engine, "small", num_prompt=3)
    ends: dict[str, Any] = {}
    while engine.has_unfinished:
        ends |= {output.request_id: output for output in engine.step() if output.finish_reason}
    assert ends["huge"].finish_reason is FinishReason.ERROR
    assert ends["huge"].error == "even an empty cache could not hold it"
    assert ends["small"].finish_reason is FinishReason.LENGTH


def test_a_request_passed_over_does_not_stop_the_next() -> None:
    class NotA(ContinuousBatching):
        def admit(self, request: RequestView, step: SchedulingStep) -> bool:
            return request.request_id != "a"

    engine = engine_of(NotA, num_blocks=8)
    for name in "abc":
        add(engine, name, num_prompt=3)
    engine.step()
    assert [row.request_id for row in engine.executor.history[-1].scheduled] == ["b", "c"]


def test_no_newcomer_takes_the_blocks_a_running_request_waits_for() -> None:
    """A needs three more blocks, two are free: B gives way, and C, for whom there would be room, does not slip in."""
    engine = engine_of(ContinuousBatching, num_blocks=7, max_chunk_tokens=11)
    add(engine, "a", num_prompt=22, max_tokens=1)
    add(engine, "b", num_prompt=5)
    engine.step()
    add(engine, "c", num_prompt=1)
    assert engine.planner.allocator.stats().num_free_blocks == 2
    taken = []
    for _ in range(3):
        engine.step()
        taken.append([row.request_id for row in engine.executor.history[-1].scheduled])
    assert taken == [["a"], ["b", "c"], ["b", "c"]]


def test_nobody_starts_a_prompt_that_cannot_be_finished_beside_the_others() -> None:
    """B's first chunk would fit beside A, its whole prompt would not: it waits instead of being computed twice."""
    engine = engine_of(ContinuousBatching, num_blocks=6, max_chunk_tokens=4)
    add(engine, "a", num_prompt=4, max_tokens=8)
    engine.step()
    add(engine, "b", num_prompt=22, max_tokens=1)
    recomputed = {}
    while engine.has_unfinished:
        for output in engine.step():
            if output.completion is not None:
                recomputed[output.request_id] = output.completion.metrics.num_recomputed_tokens
    assert recomputed == {"a": 0, "b": 0}

"""The recorder against events made by hand: what it counts, and that the events' order does not confuse it."""

from __future__ import annotations

from llmkit.hookspecs import RequestEvent, StepEvent
from llmkit.interfaces.cache import CacheStats
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.types import FinishReason, RequestMetrics, ScheduledRequest, StepPlan

Row = tuple[str, int, int]


def step(step_id: int, landed_at: float, rows: list[Row], new: dict[str, int] | None = None) -> StepEvent:
    """A step of (request id, start, number of tokens), launched half a second before it landed."""
    scheduled = tuple(ScheduledRequest(name, 0, start, count, False, 0) for name, start, count in rows)
    times = (landed_at - 0.6, landed_at - 0.5, landed_at, landed_at + 0.1)
    return StepEvent(StepPlan(step_id, scheduled), *times, new or {}, 2, 1, CacheStats(3, 0, 5), 12, 2)


def finished(request_id: str, num_output: int, arrival: float = 0.0, at: float = 9.0) -> RequestEvent:
    metrics = RequestMetrics(arrival, 1.0, at, num_preemptions=1)
    return RequestEvent(request_id, 4, num_output, FinishReason.LENGTH, None, metrics, "tenant", 3, 2.5)


def test_token_times_come_from_the_step_that_brought_them() -> None:
    recorder = MetricsRecorder()
    recorder.llmkit_step_finished(step(0, 1.0, [("a", 0, 4)], {"a": 1}))
    recorder.llmkit_step_finished(step(1, 2.5, [("a", 4, 1)], {"a": 2}))
    recorder.llmkit_request_finished(finished("a", 4, arrival=0.25))
    recorder.llmkit_step_finished(step(2, 3.0, [("a", 5, 1)], {"a": 1}))
    record = recorder.requests["a"]
    assert record.token_times == [1.0, 2.5, 2.5, 3.0]
    assert (record.ttft, record.e2el) == (0.75, 2.75)
    assert record.tpot == (2.75 - 0.75) / 3
    assert list(record.itl) == [1.5, 0.0, 0.5]
    assert (record.tenant, record.priority, record.deadline, record.num_preemptions) == ("tenant", 3, 2.5, 1)


def test_positions_computed_twice_are_counted_once_each_time() -> None:
    recorder = MetricsRecorder()
    recorder.llmkit_step_finished(step(0, 1.0, [("a", 0, 6), ("b", 0, 2)]))
    recorder.llmkit_step_finished(step(1, 2.0, [("a", 0, 4)]))  # preempted before: 4 again
    recorder.llmkit_step_finished(step(2, 3.0, [("a", 4, 5), ("b", 2, 1)]))  # 2 again, 3 new
    recorder.llmkit_step_finished(step(3, 4.0, [("a", 0, 9)]))  # all 9 again
    assert recorder.requests["a"].num_recomputed_tokens == 4 + 2 + 9
    assert recorder.requests["b"].num_recomputed_tokens == 0
    assert [record.num_recomputed_tokens for record in recorder.steps] == [0, 4, 2, 9]


def test_what_the_cache_served_is_where_the_first_row_starts() -> None:
    recorder = MetricsRecorder()
    recorder.llmkit_step_finished(step(0, 1.0, [("a", 3, 1)]))
    recorder.llmkit_step_finished(step(1, 2.0, [("a", 0, 4)]))  # recomputed without the cache: 1 token again
    record = recorder.requests["a"]
    assert record.num_cached_tokens == 3
    assert record.num_recomputed_tokens == 4 - 3 + 3
    assert record.first_scheduled_time == 0.5


def test_start_forgets_the_run_before() -> None:
    recorder = MetricsRecorder()
    recorder.llmkit_step_finished(step(0, 1.0, [("a", 0, 1)]))
    recorder.refused("b", 0.0, 5, "too long")
    recorder.slept(2.0)
    recorder.start(7.0)
    recorder.stop(9.5)
    assert (recorder.requests, recorder.steps, recorder.duration) == ({}, [], 2.5)
    recorder.llmkit_step_finished(step(0, 8.0, [("a", 0, 1)]))
    assert recorder.steps[0].idle_before == 0.0


def test_idle_time_belongs_to_the_next_step() -> None:
    recorder = MetricsRecorder()
    recorder.slept(0.25)
    recorder.slept(0.5)
    recorder.llmkit_step_finished(step(0, 1.0, [("a", 0, 1)]))
    recorder.llmkit_step_finished(step(1, 2.0, [("a", 1, 1)]))
    assert [record.idle_before for record in recorder.steps] == [0.75, 0.0]

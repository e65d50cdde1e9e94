"""The step loop: same tokens at every depth, events, aborts, faults."""

from typing import Any

import pluggy
import pytest

from llmkit import hookspecs
from llmkit.engine.engine import Engine
from llmkit.engine.limits import EngineLimits
from llmkit.engine.planner import Planner
from llmkit.engine.progress import StepOutput
from llmkit.errors import RequestError
from llmkit.interfaces.cache import CacheSpec
from llmkit.interfaces.clock import VirtualClock
from llmkit.testing import FakeExecutor, continuation
from llmkit.types import Completion, FinishReason, Request, SamplingParams
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous

VOCAB, EOS = 50, frozenset({7})


class Faulty:
    """Passes plans on; raises `error` in launch, or in wait, of the step numbered `when`."""

    def __init__(self, executor: FakeExecutor, when: int, error: BaseException, at_launch: bool) -> None:
        self.executor, self.when, self.error, self.at_launch = executor, when, error, at_launch
        self.num_launched = 0

    def launch(self, plan: Any) -> Any:
        self.num_launched += 1
        is_faulty = self.num_launched == self.when
        if is_faulty and self.at_launch:
            raise self.error
        pending = self.executor.launch(plan)
        return self if is_faulty else pending

    def wait(self) -> Any:
        raise self.error


class Observer:
    """Keeps every event."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.requests: list[Any] = []

    @hookspecs.hookimpl
    def llmkit_step_finished(self, event: Any) -> None:
        self.steps.append(event)

    @hookspecs.hookimpl
    def llmkit_request_finished(self, event: Any) -> None:
        self.requests.append(event)


def build(depth: int = 0, num_blocks: int = 16, faults: dict[str, int] | None = None, **limits: int) -> Engine:
    planner = Planner(
        Continuous(Continuous.Settings(**limits)), PagedCache(PagedCache.Settings(), CacheSpec(num_blocks, 4))
    )
    executor = FakeExecutor(4, VOCAB, faults or {})
    return Engine(planner, executor, EngineLimits(VOCAB, num_blocks * 4, EOS), VirtualClock(), depth=depth)


def request(name: str, num_prompt: int = 5, seed: int = 0, **params: Any) -> Request:
    return Request(name, [(3 * at + seed) % VOCAB for at in range(num_prompt)], SamplingParams(**params), seed=seed)


def drain(engine: Engine, outputs: list[StepOutput] | None = None) -> dict[str, Completion]:
    """Step to the end, a second of virtual time each; completions by id."""
    outputs = [] if outputs is None else outputs
    while engine.has_unfinished:
        outputs += engine.step()
        engine.clock.sleep_until(engine.clock.now() + 1.0)
    return {output.request_id: output.completion for output in outputs if output.completion}


def wanted(one: Request, num_slots: int = 64) -> tuple[tuple[int, ...], FinishReason]:
    tokens, reason = continuation(one, VOCAB, EOS, num_slots)
    return tuple(tokens), reason


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("num_blocks", [16, 6], ids=["roomy", "tight"])
def test_every_depth_gives_the_same_tokens(depth: int, num_blocks: int) -> None:
    engine = build(depth, num_blocks, max_num_seqs=4, max_num_batched_tokens=9)
    requests = [request(str(n), num_prompt=1 + 3 * n, seed=n, max_tokens=6 + n) for n in range(6)]
    expected = {one.request_id: wanted(one, num_blocks * 4) for one in requests}
    for one in requests:
        engine.add(one)
    completions = drain(engine)
    assert {name: (c.token_ids, c.finish_reason) for name, c in completions.items()} == expected
    assert len({token for tokens, _ in expected.values() for token in tokens}) > 20, "the run is not vacuous"
    assert (num_blocks == 6) == any(c.metrics.num_preemptions for c in completions.values())


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_come_one_by_one_and_the_last_brings_the_completion(depth: int) -> None:
    engine, one, outputs = build(depth), request("a", max_tokens=5, ignore_eos=True), []
    tokens, _ = wanted(one)
    engine.add(one)
    drain(engine, outputs)
    assert [output.token_ids for output in outputs] == [(token,) for token in tokens]
    assert [output.finish_reason for output in outputs] == [None] * 4 + [FinishReason.LENGTH]
    assert outputs[-1].completion is not None and outputs[-1].completion.token_ids == tokens


def test_depth_is_how_many_steps_stay_in_flight() -> None:
    for depth in (0, 1, 2):
        engine = build(depth)
        engine.add(request("a", max_tokens=8, ignore_eos=True))
        engine.step()
        assert engine.executor.num_steps == 1 and engine.executor.num_results == (depth == 0)
        for _ in range(4):
            engine.step()
        assert engine.executor.num_steps - engine.executor.num_results == depth


def test_a_stop_token_ends_a_request_and_tokens_sampled_beyond_it_are_dropped() -> None:
    one = request("a", max_tokens=40, seed=3)
    tokens, reason = wanted(one)
    assert reason is FinishReason.STOP and tokens[-1] == 7 and len(tokens) > 3
    for depth in (0, 1, 2):
        engine = build(depth)
        engine.add(request("a", max_tokens=40, seed=3))
        completion = drain(engine)["a"]
        assert completion.token_ids == tokens and completion.finish_reason is FinishReason.STOP
        assert engine.planner.allocator.stats().num_used_blocks == 0


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("after", range(6))
def test_aborting_at_any_moment_keeps_what_was_read_and_frees_the_rest(depth: int, after: int) -> None:
    engine, neighbour = build(depth), request("b", max_tokens=9, seed=1, ignore_eos=True)
    one = request("a", max_tokens=20, ignore_eos=True)
    (tokens, _), expected = wanted(one), wanted(neighbour)
    engine.add(one)
    engine.add(neighbour)
    outputs: list[StepOutput] = []
    for _ in range(after):
        outputs += engine.step()
    engine.abort(["a", "nobody"])
    engine.abort(["a"])
    completions = drain(engine, outputs)
    aborted = completions["a"]
    assert aborted.finish_reason is FinishReason.ABORT
    assert aborted.token_ids == tokens[: max(0, after - depth)]
    assert (completions["b"].token_ids, completions["b"].finish_reason) == expected
    assert engine.planner.allocator.stats().num_used_blocks == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_a_row_that_fails_ends_only_its_request(depth: int) -> None:
    engine = build(depth, faults={"a": 7})
    neighbour = request("b", max_tokens=9, seed=1)
    expected = wanted(neighbour)
    engine.add(request("a", num_prompt=5, max_tokens=20, ignore_eos=True))
    engine.add(neighbour)
    completions = drain(engine)
    assert completions["a"].finish_reason is FinishReason.ERROR and len(completions["a"].token_ids) == 2
    assert completions["a"].error == "fault injected at 7 tokens"
    assert (completions["b"].token_ids, completions["b"].finish_reason) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: request("x", num_prompt=0), "the prompt is empty"),
        (lambda: request("x", num_prompt=64), "the prompt has 64 tokens, but the model holds 64 with at least one"),
        (lambda: Request("x", [1, 50], SamplingParams()), r"token id 50 in prompt is outside the vocabulary \[0, 50\)"),
        (lambda: Request("x", [3, "7"], SamplingParams()), "token ids of a prompt are integers: 'str' object cannot"),
        (lambda: request("x", logit_bias={99: 1.0}), "token id 99 in logit_bias"),
        (lambda: request("x", allowed_token_ids=(51,)), "token id 51 in allowed_token_ids"),
        (lambda: request("x", bad_token_ids=(-2,)), "token id -2 in bad_token_ids"),
        (lambda: request("x", stop_token_ids=(50,)), "token id 50 in stop_token_ids"),
        (lambda: request("a"), "request id 'a' is in use"),
    ],
)
def test_a_bad_request_is_refused_in_one_line_and_its_neighbours_finish(bad: Any, message: str) -> None:
    engine, one = build(), request("a", max_tokens=4)
    expected = wanted(one)
    engine.add(one)
    with pytest.raises(RequestError, match=message) as caught:
        engine.add(bad())
    assert "\n" not in str(caught.value)
    completions = drain(engine)
    assert {name: (c.token_ids, c.finish_reason) for name, c in completions.items()} == {"a": expected}


def test_the_reach_of_the_model_cuts_a_request_short() -> None:
    engine = build()
    engine.add(request("a", num_prompt=60, max_tokens=40, ignore_eos=True))
    completion = drain(engine)["a"]
    assert len(completion.token_ids) == 4 and completion.finish_reason is FinishReason.LENGTH


def test_an_engine_survives_a_scheduler_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, one = build(depth=1), request("a", max_tokens=6)
    expected = wanted(one)
    engine.add(one)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.planner.scheduler, "repeats", lambda num_waiting, num_free_seqs: False)
        patch.setattr(engine.planner.scheduler, "schedule", lambda queue, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    completion = drain(engine)["a"]
    assert (completion.token_ids, completion.finish_reason) == expected


def observed(depth: int = 0) -> tuple[Engine, Observer]:
    observer, manager = Observer(), pluggy.PluginManager("llmkit")
    manager.add_hookspecs(hookspecs)
    manager.register(observer)
    engine = build(depth)
    engine.hooks = manager.hook
    return engine, observer


def test_observers_hear_of_every_step() -> None:
    engine, observer = observed()
    engine.add(request("a", num_prompt=6, max_tokens=3, ignore_eos=True))
    engine.add(request("b", num_prompt=3, max_tokens=2, ignore_eos=True, seed=1))
    drain(engine)
    assert [event.plan.step_id for event in observer.steps] == [0, 1, 2]
    assert [event.plan.num_tokens for event in observer.steps] == [9, 2, 1]
    assert [event.new_tokens for event in observer.steps] == [{"a": 1, "b": 1}, {"a": 1, "b": 1}, {"a": 1}]
    assert [(event.num_running, event.num_waiting) for event in observer.steps] == [(2, 0), (2, 0), (1, 0)]
    assert [event.cache.num_used_blocks for event in observer.steps] == [3, 3, 2]
    for event in observer.steps:
        assert event.planned_at <= event.launched_at <= event.sent_at <= event.landed_at <= event.finished_at


@pytest.mark.parametrize("depth", [0, 1])
def test_observers_hear_of_every_end_once(depth: int) -> None:
    engine, observer = observed(depth)
    engine.add(request("a", max_tokens=3, ignore_eos=True))
    engine.add(Request("b", [1, 2], SamplingParams(max_tokens=9), tenant="t", priority=4))
    engine.step()
    engine.abort(["b"])
    drain(engine)
    ends = {event.request_id: event for event in observer.requests}
    assert len(observer.requests) == 2
    assert (ends["a"].finish_reason, ends["a"].num_prompt_tokens, ends["a"].num_output_tokens) == ("length", 5, 3)
    assert (ends["b"].finish_reason, ends["b"].tenant, ends["b"].priority) == ("abort", "t", 4)


def test_latency_starts_at_the_scheduled_arrival() -> None:
    engine = build()
    engine.clock.sleep_until(10.0)
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True), arrival_time=4.0))
    metrics = drain(engine)["a"].metrics
    assert (metrics.ttft, metrics.e2el) == (6.0, 8.0)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("at_launch", [True, False], ids=["launch", "wait"])
@pytest.mark.parametrize("when", [1, 2, 4])
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(depth: int, at_launch: bool, when: int) -> None:
    engine = build(depth, max_num_seqs=2)
    engine.executor = Faulty(engine.executor, when, MemoryError("no room\nat all"), at_launch)  # type: ignore[arg-type]
    requests = [request(str(n), seed=n, max_tokens=6, ignore_eos=True) for n in range(5)]
    expected = {one.request_id: wanted(one) for one in requests}
    for one in requests:
        engine.add(one)
    completions = drain(engine)
    failed = {name for name, c in completions.items() if c.finish_reason is FinishReason.ERROR}
    assert 1 <= len(failed) <= 2
    assert {completions[name].error for name in failed} == {"the step failed: MemoryError: no room"}
    others = {name: (c.token_ids, c.finish_reason) for name, c in completions.items() if name not in failed}
    assert others == {name: expected[name] for name in expected if name not in failed}
    assert engine.planner.allocator.stats().num_used_blocks == 0
    assert engine.planner.num_running == engine.planner.num_waiting == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_an_interrupt_in_a_launch_goes_up_and_leaks_nothing(depth: int) -> None:
    engine = build(depth)
    engine.executor = Faulty(engine.executor, 2, KeyboardInterrupt(), at_launch=True)  # type: ignore[arg-type]
    engine.add(request("a", max_tokens=6, ignore_eos=True))
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    engine.abort(["a"])
    drain(engine)
    assert engine.planner.allocator.stats().num_used_blocks == 0
    one = request("b", max_tokens=6, ignore_eos=True)
    expected = wanted(one)
    engine.add(one)
    completion = drain(engine)["b"]
    assert (completion.token_ids, completion.finish_reason) == expected


def test_a_broken_invariant_is_not_contained() -> None:
    engine = build()
    engine.executor = Faulty(engine.executor, 1, AssertionError("slots disagree"), at_launch=False)  # type: ignore[arg-type]
    engine.add(request("a"))
    with pytest.raises(AssertionError, match="slots disagree"):
        drain(engine)

"""Playing requests on the real engine over a fake executor: when they are sent, timed, refused and interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit.errors import LlmkitError
from llmkit.interfaces.clock import MonotonicClock, VirtualClock
from llmkit.interfaces.scheduler import RequestQueue, RequestView, SchedulingStep
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.summary import summarise
from llmkit.testing.tags import next_token
from llmkit.types import FinishReason, SamplingParams, StepPlan
from llmkit.workload.driver import Played, run_workload
from llmkit.workload.requests import TimedRequest
from llmkit_schedulers.continuous import Continuous
from tests.workload.harness import FakeTarget, fake_target

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def play(
    target: FakeTarget, requests: Sequence[TimedRequest], sampling: SamplingParams = GREEDY
) -> tuple[Played, MetricsRecorder]:
    recorder = MetricsRecorder()
    return run_workload(target, requests, sampling, recorder), recorder


def some(arrivals: Sequence[float], max_tokens: int = 3, prompt_len: int = 5) -> list[TimedRequest]:
    return [TimedRequest(when, tuple(range(i, i + prompt_len)), max_tokens) for i, when in enumerate(arrivals)]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_times_on_a_virtual_clock_are_exact(depth: int) -> None:
    target = fake_target(cost=lambda plan: 0.5, depth=depth)
    target.engine.clock.sleep_until(100.0)  # the run starts late on this clock
    _, recorder = play(target, some([0.0, 2.25]))
    first, second = recorder.requests["w0"], recorder.requests["w1"]
    assert recorder.started_at == 100.0
    assert (first.arrival_time, second.arrival_time) == (100.0, 102.25)
    assert first.token_times == [100.5, 101.0, 101.5]
    assert second.token_times == [102.75, 103.25, 103.75]
    assert (first.ttft, first.e2el, second.ttft, second.e2el) == (0.5, 1.5, 0.5, 1.5)
    assert recorder.duration == 3.75


def test_latency_counts_from_the_schedule_not_from_when_the_loop_came_round() -> None:
    """Coordinated omission: the second request arrives in the middle of a step of 10 s."""
    target = fake_target(cost=lambda plan: 10.0)
    _, recorder = play(target, some([0.0, 1.0], max_tokens=1))
    assert recorder.requests["w1"].ttft == 19.0


def test_unsorted_arrivals_are_sent_in_order_and_reported_by_index() -> None:
    target = fake_target()
    played, recorder = play(target, some([5.0, 0.0, 2.0]))
    assert list(recorder.requests) == ["w1", "w2", "w0"]
    for index, completion in played.completions.items():
        prompt = list(range(index, index + 5))
        expected: list[int] = []
        seed = _seed(index)
        for _ in range(3):
            expected.append(next_token(seed, prompt + expected, 300))
        assert list(completion.token_ids) == expected
    assert sorted(played.completions) == [0, 1, 2]


def _seed(index: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence([0, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def test_a_refused_request_fails_and_the_others_finish() -> None:
    target = fake_target(num_blocks=8)  # 32 tokens
    requests = [*some([0.0, 0.0]), TimedRequest(0.0, tuple(range(40)), 2), TimedRequest(0.1, (), 2)]
    requests += [TimedRequest(0.2, (300,), 2), *some([0.3])]
    played, recorder = play(target, requests)
    assert sorted(played.completions) == [0, 1, 5]
    assert "holds 32" in played.refusals[2]
    assert "empty" in played.refusals[3]
    assert "outside the vocabulary" in played.refusals[4]
    result = summarise(recorder)
    assert (result["completed"], result["failed"], result["aborted"]) == (3, 3, 0)
    assert recorder.requests["w2"].error == played.refusals[2]


def test_neighbours_of_a_refused_request_get_the_same_tokens() -> None:
    good = some([0.0, 0.0, 0.0])
    alone, _ = play(fake_target(), good)
    beside, _ = play(fake_target(), [*good, TimedRequest(0.0, (), 1)])
    assert {i: c.token_ids for i, c in alone.completions.items()} == {
        i: c.token_ids for i, c in beside.completions.items()
    }


def test_priority_tenant_deadline_and_hint_reach_the_scheduler() -> None:
    seen: list[RequestView] = []

    class Watching(Continuous):
        def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
            seen.extend(queue.waiting)
            super().schedule(queue, step)

    target = fake_target(scheduler=Watching(Watching.Settings()))
    target.engine.clock.sleep_until(50.0)
    play(target, [TimedRequest(1.0, (1,), 1, priority=4, tenant="t", deadline=3.0, length_hint=9)])
    view = seen[0]
    assert (view.priority, view.tenant, view.deadline, view.length_hint) == (4, "t", 53.0, 9)
    assert view.arrival_time == 51.0


def test_waiting_for_arrivals_is_not_host_time() -> None:
    target = fake_target()
    _, recorder = play(target, some([3.0, 6.0]))
    assert sum(step.idle_before for step in recorder.steps) == pytest.approx(3.0 + 6.0 - 3.03)
    assert summarise(recorder)["host_us_per_step"] == pytest.approx(0.0, abs=1e-6)


def test_device_time_is_that_of_the_results() -> None:
    target = fake_target(cost=lambda plan: 0.5)
    launch = target.engine.executor.launch

    def launch_timed(plan: StepPlan) -> Any:
        pending = launch(plan)
        wait = pending.wait
        return SimpleNamespace(wait=lambda: replace(wait(), device_seconds=0.25))

    target.engine.executor = SimpleNamespace(launch=launch_timed)
    _, recorder = play(target, some([3.0, 6.0]))
    assert [step.device_seconds for step in recorder.steps] == [0.25] * len(recorder.steps)
    idle = summarise(recorder, device="cuda")["gpu_idle"]
    assert idle == pytest.approx(1 - 0.25 * len(recorder.steps) / recorder.duration) and 0 < idle < 1


def test_real_time_waits_for_arrivals() -> None:
    target = fake_target(clock=MonotonicClock())
    _, recorder = play(target, some([0.0, 0.15]))
    second = recorder.requests["w1"]
    assert second.first_scheduled_time is not None
    assert second.first_scheduled_time >= second.arrival_time
    assert recorder.duration >= 0.15
    assert second.ttft is not None
    assert 0 < second.ttft < 0.1


def test_sampling_is_that_of_the_run_with_the_requests_own_length() -> None:
    params = SamplingParams(n=3, temperature=0.5, max_tokens=50, min_tokens=40, ignore_eos=True)
    played, recorder = play(fake_target(), some([0.0], max_tokens=4), params)
    assert len(played.completions[0].token_ids) == 4
    assert list(recorder.requests) == ["w0"]


class _Raising:
    """Ends the run from inside a step, as Ctrl-C in the middle of a kernel would."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error = error
        self.left = after

    def __call__(self, plan: StepPlan) -> float:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return 1.0


def test_an_interrupt_inside_a_step_keeps_what_was_measured() -> None:
    target = fake_target(cost=_Raising(KeyboardInterrupt(), after=4))
    played, recorder = play(target, some([0.0, 0.0, 50.0], max_tokens=4))
    assert played.interrupted
    assert sorted(played.completions) == [0, 1]
    assert summarise(recorder, interrupted=True)["completed"] == 2
    assert target.plugin_manager.get_plugins() == set()


@pytest.mark.parametrize("depth", [0, 1])
def test_ctrl_c_aborts_the_rest_and_leaves_the_engine_usable(depth: int) -> None:
    def cost(plan: StepPlan) -> float:
        if plan.step_id == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    before = signal.getsignal(signal.SIGINT)
    target = fake_target(cost=cost, depth=depth)
    played, recorder = play(target, [*some([0.0], max_tokens=2), *some([0.0], max_tokens=90), *some([99.0])])
    assert played.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert recorder.requests["w1"].finish_reason == FinishReason.ABORT
    result = summarise(recorder, interrupted=True)
    assert (result["completed"], result["aborted"]) == (1, 1)
    assert not target.engine.has_unfinished
    assert target.engine.planner.allocator.stats().num_used_blocks == 0
    again, _ = play(target, some([0.0]))
    assert not again.interrupted
    assert len(again.completions) == 1


def test_ctrl_c_is_noticed_while_waiting_for_an_arrival() -> None:
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    target = fake_target(clock=MonotonicClock())
    played, recorder = play(target, some([0.0, 60.0]))
    timer.join()
    assert played.interrupted
    assert len(played.completions) == 1
    assert recorder.duration < 5.0


def test_a_fault_of_the_engine_is_raised_and_what_was_open_is_counted() -> None:
    target = fake_target(cost=_Raising(AssertionError("slots disagree"), after=1))
    recorder = MetricsRecorder()
    with pytest.raises(AssertionError, match="slots disagree"):
        run_workload(target, some([0.0], max_tokens=9), GREEDY, recorder)
    assert recorder.requests["w0"].finish_reason == "abort"
    assert recorder.duration == 1.0


def test_a_step_that_fails_counts_its_requests_as_failed_and_the_run_goes_on() -> None:
    def cost(plan: StepPlan) -> float:
        if plan.step_id == 1:
            raise RuntimeError("device lost")
        return 1.0

    recorder = MetricsRecorder()
    run_workload(fake_target(cost=cost), some([0.0, 30.0], max_tokens=9), GREEDY, recorder)
    assert recorder.requests["w0"].error == "the step failed: RuntimeError: device lost"
    assert recorder.requests["w1"].finish_reason == "length"


def test_a_scheduler_that_runs_nothing_is_named_instead_of_spun_on() -> None:
    class Lazy(Continuous):
        def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
            return None

    target = fake_target(scheduler=Lazy(Lazy.Settings()))
    with pytest.raises(LlmkitError, match="scheduler Lazy has run nothing for 10 s; waiting: 2"):
        play(target, some([0.0, 0.0]))


def test_a_scheduler_that_waits_for_time_is_asked_again() -> None:
    class Late(Continuous):
        def admit(self, request: RequestView, step: SchedulingStep) -> bool:
            return step.now >= 4.0

    _, recorder = play(fake_target(scheduler=Late(Late.Settings())), some([0.0]))
    record = recorder.requests["w0"]
    assert record.first_scheduled_time == pytest.approx(4.0, abs=0.01)
    assert record.e2el is not None


def test_an_engine_with_other_hooks_is_refused() -> None:
    target = fake_target()
    target.engine.hooks = None
    with pytest.raises(LlmkitError, match="nothing can be measured"):
        play(target, some([0.0]))


def test_preemption_shows_in_the_numbers() -> None:
    target = fake_target(clock=VirtualClock(), num_blocks=10)
    _, recorder = play(target, some([0.0] * 4, max_tokens=20, prompt_len=6))
    result = summarise(recorder)
    assert result["completed"] == 4
    assert result["num_preemptions"] > 0
    assert result["recompute_tax"] > 0
    computed = sum(step.num_tokens for step in recorder.steps)
    needed = 4 * (6 + 20 - 1)
    assert result["recompute_tax"] == pytest.approx((computed - needed) / computed)
    assert max(step.num_used_blocks for step in recorder.steps) == 10
    assert 0 <= result["kv_waste"] < 1


@pytest.mark.parametrize("depth", [0, 1])
def test_slots_are_counted_while_the_step_runs(depth: int) -> None:
    """Blocks of 4: a prompt of 5 takes 8 slots; its last step is seen before its blocks go back."""
    _, recorder = play(fake_target(depth=depth), some([0.0], max_tokens=3))
    reserved = [step.num_reserved_slots for step in recorder.steps]
    unwritten = [step.num_unwritten_slots for step in recorder.steps]
    assert reserved == [8, 8, 8]
    assert unwritten == ([3, 2, 1] if depth == 0 else [2, 1, 1])  # at depth 1 the next step is under way
    assert [step.num_used_blocks for step in recorder.steps] == [2, 2, 2]

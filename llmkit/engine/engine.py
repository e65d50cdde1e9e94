"""The engine: queue many requests, step them together. Torch-free; tensors live behind the executor."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pluggy

from llmkit.engine.containment import one_line
from llmkit.engine.limits import EngineLimits, check_request
from llmkit.engine.planner import Planner
from llmkit.engine.progress import Progress, StepOutput
from llmkit.engine.steady import Crew, SteadyDecode
from llmkit.hookspecs import RequestEvent, StepEvent
from llmkit.interfaces.clock import Clock, MonotonicClock
from llmkit.interfaces.executor import Executor, PendingStep
from llmkit.types import FinishReason, Request, StepPlan, StepResult

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _InFlight:
    plan: StepPlan
    planned_at: float
    launched_at: float
    sent_at: float = 0.0
    pending: PendingStep | None = None
    fault: BaseException | None = None

    def result(self) -> StepResult:
        """The step's result; if it failed, one error for each of its rows. A broken invariant is never contained.

        An interrupt goes on up; the step stays in flight and can be waited for again.
        """
        try:
            if self.pending is not None:
                return self.pending.wait()
        except Exception as fault:
            self.fault = fault
        if isinstance(self.fault, AssertionError):
            raise self.fault
        message = f"the step failed: {one_line(self.fault)}"
        if isinstance(self.fault, Exception):
            log.error(message, exc_info=self.fault)
        return StepResult(self.plan.step_id, (), errors=dict.fromkeys(range(len(self.plan.scheduled)), message))


@dataclass(slots=True)
class Engine:
    """Synchronous: nothing happens outside `add`, `abort` and `step`.

    `depth` is how many steps may be in flight while the next one is planned: 0 reads each step's tokens before
    planning the next, 1 plans one step ahead. Both give the same tokens. `hooks` receives the event hooks.
    """

    planner: Planner
    executor: Executor
    limits: EngineLimits
    clock: Clock = field(default_factory=MonotonicClock)
    hooks: pluggy.HookRelay | None = None
    depth: int = 0
    _progress: dict[str, Progress] = field(default_factory=dict)
    _in_flight: deque[_InFlight] = field(default_factory=deque)
    _outputs: list[StepOutput] = field(default_factory=list)
    _stop_ids: set[int] = field(default_factory=set)
    _heeding: tuple[Crew | None, list[int]] = (None, [])

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` still has something to do."""
        return bool(self._progress or self._in_flight or self._outputs)

    def add(self, request: Request, progress: Progress | None = None, after: str | None = None) -> None:
        """Queue a request. Raises RequestError if it could never run; others are not affected.

        `after` is the id of a request with the same prompt and tenant: see `Planner.add`.
        """
        check_request(request, self.limits)
        request.max_num_tokens = min(request.max_num_tokens, self.limits.max_model_len)
        self.planner.add(request, after)
        progress = progress or Progress(request, self.limits.eos_token_ids)
        self._progress[request.request_id] = progress
        self._stop_ids |= progress.stop_ids

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests now; unknown ids are ignored, tokens still in flight are dropped."""
        for request_id in request_ids:
            request = self.planner.requests.get(request_id)
            if request is not None:
                self._finish(request, FinishReason.ABORT)
        self.planner.containment.release()

    def step(self) -> list[StepOutput]:
        """Plan a step, launch it, then take in the oldest results until at most `depth` steps are in flight.

        What a plugin raises comes up from here; call again to go on. Only requests it concerns are affected.
        """
        if self._has_failed():
            self._land_all_but(0)  # a launch was interrupted
        planned_at = self.clock.now()
        plan, rejected = self.planner.plan(planned_at)
        for request, reason in rejected.items():
            self._finish(request, FinishReason.ERROR, reason)
        if plan is not None:
            self._launch(plan, planned_at)
        # Nothing may be launched behind a failed step: it would read what that one did not write.
        self._land_all_but(0 if plan is None or self._has_failed() else self.depth)
        self.planner.containment.release()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _has_failed(self) -> bool:
        return bool(self._in_flight) and self._in_flight[-1].fault is not None

    def _land_all_but(self, num_to_keep: int) -> None:
        while len(self._in_flight) > num_to_keep:
            result = self._in_flight[0].result()
            self._land(self._in_flight.popleft(), result)

    def _launch(self, plan: StepPlan, planned_at: float) -> None:
        """A launch that fails lands like any other step, and ends the requests it ran; an interrupt goes on up."""
        step = _InFlight(plan, planned_at, self.clock.now())
        self._in_flight.append(step)
        try:
            step.pending = self.executor.launch(plan)
        except Exception as fault:
            step.fault = fault
        except BaseException as fault:
            step.fault = fault
            raise
        finally:
            step.sent_at = self.clock.now()

    def _land(self, step: _InFlight, result: StepResult) -> None:
        """Advance lengths, append tokens, check stops, tell the observers."""
        landed_at = self.clock.now()
        if step.fault is not None:
            self.planner.forget_saved(step.plan)
        if self.hooks is None or not self.hooks.llmkit_step_finished.get_hookimpls():
            self._take_in(step.plan, result, landed_at)
            return
        planner, cache = self.planner, self.planner.allocator.stats()
        before = planner.num_running, planner.num_waiting, cache
        slots = cache.num_used_blocks * planner.allocator.spec.block_size, planner.num_unwritten_slots
        new_tokens = self._take_in(step.plan, result, landed_at)
        times = step.planned_at, step.launched_at, landed_at, self.clock.now()
        event = StepEvent(step.plan, *times, new_tokens, *before, *slots, step.sent_at, result.device_seconds)
        self.hooks.llmkit_step_finished(event=event)

    def _take_in(self, plan: StepPlan, result: StepResult, now: float) -> dict[str, int]:
        """Take a step's results in; how many tokens each request got."""
        steady = self.planner.lands_steadily(plan, result)
        if steady is not None:
            return self._take_in_steadily(steady, result)
        new_tokens: dict[str, int] = {}
        for row, request in enumerate(self.planner.land(plan, result.errors)):
            if request is None:
                continue
            progress = self._progress[request.request_id]
            if row in result.prompt_logprobs:
                progress.add_prompt_logprobs(plan.scheduled[row].start, result.prompt_logprobs[row])
            if row in result.errors:
                self._finish(request, FinishReason.ERROR, result.errors[row])
            elif plan.scheduled[row].samples:
                new_tokens[request.request_id] = 1
                self._hear(progress, progress.add_token, result.token_ids[row], result.logprobs.get(row), now)
        return new_tokens

    def _hear(self, progress: Progress, add: Callable[..., FinishReason | None], *token: Any) -> None:
        """`add` a token to one request's output. If that raises, only this request ends."""
        try:
            reason = add(*token)
        except BaseException as fault:
            progress.give_up_text()
            error = self.planner.containment.take(fault, "its output")
            self._finish(progress.request, FinishReason.ERROR, error)
            return
        if reason is not None:
            self._finish(progress.request, reason)
        elif progress.streams:
            self._outputs.append(progress.take_output())

    def _take_in_steadily(self, steady: SteadyDecode, result: StepResult) -> dict[str, int]:
        """The same for a step that repeats the one before: only who may end or heeds every token is looked at."""
        token_ids = result.token_ids
        crew = steady.land(token_ids)
        new_tokens = crew.new_tokens()
        rows = self._heeding_rows(crew)
        ending = [crew.requests.index(request) for request in steady.full_length()]
        if not self._stop_ids.isdisjoint(token_ids):
            ending += [row for row, token_id in enumerate(token_ids) if token_id in self._stop_ids]
        for row in sorted({*rows, *ending}) if ending else rows:
            request = crew.requests[row]
            if request.epoch != crew.lineup.epochs[row]:
                continue
            progress = self._progress[request.request_id]
            self._hear(progress, progress.heed, token_ids[row], result.logprobs.get(row))
        return new_tokens

    def _heeding_rows(self, crew: Crew) -> list[int]:
        """Rows whose progress looks at every token; the same for all steps of a crew."""
        if self._heeding[0] is not crew:
            progresses = [self._progress.get(request.request_id) for request in crew.requests]
            self._heeding = crew, [row for row, p in enumerate(progresses) if p is not None and p.heeds_every_token]
        return self._heeding[1]

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self.planner.finish(request, reason, error)
        progress = self._progress.pop(request.request_id)
        self._outputs.append(progress.finish(reason, error, self.clock.now()))
        if self.hooks is not None:
            event = RequestEvent(
                request.request_id,
                request.num_prompt_tokens,
                request.num_output_tokens,
                reason,
                error,
                progress.metrics(),
                request.tenant,
                request.priority,
                request.deadline,
            )
            try:
                self.hooks.llmkit_request_finished(event=event)
            except BaseException as fault:
                self.planner.containment.keep(fault)

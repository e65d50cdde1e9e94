"""A plugin object that watches a run through the event hooks. While the run goes on it only keeps the events."""

from __future__ import annotations

from llmkit.hookspecs import RequestEvent, StepEvent, hookimpl
from llmkit.metrics.records import RequestRecord, StepRecord
from llmkit.types import BlockCopies


class MetricsRecorder:
    """Collects records of every request and step between `start` and `stop`.

    Register it with the plugin manager whose hooks the engine calls. Request ids must differ within a run.
    """

    def __init__(self) -> None:
        self.started_at = 0.0
        self.stopped_at = 0.0
        self.num_steps = 0
        self.num_new_tokens = 0
        self._requests: dict[str, RequestRecord] = {}
        self._steps: list[StepRecord] = []
        self._heard: list[tuple[StepEvent, float] | RequestEvent | RequestRecord] = []
        self._idle = 0.0

    @property
    def requests(self) -> dict[str, RequestRecord]:
        """Records by id, in the order they were first heard of. What was heard is worked through here, not before."""
        self._work_through()
        return self._requests

    @property
    def steps(self) -> list[StepRecord]:
        """Records of the steps, in the order they landed."""
        self._work_through()
        return self._steps

    def start(self, now: float) -> None:
        """The run starts: arrivals and the duration count from here. Forgets what was seen before."""
        self._heard.clear()
        self._requests.clear()
        self._steps.clear()
        self.num_steps = 0
        self.num_new_tokens = 0
        self.started_at = self.stopped_at = now
        self._idle = 0.0

    def stop(self, now: float) -> None:
        """The run has ended."""
        self.stopped_at = now

    @property
    def duration(self) -> float:
        """Seconds from start to stop."""
        return self.stopped_at - self.started_at

    def slept(self, seconds: float) -> None:
        """The caller waited for the next arrival with nothing to run."""
        self._idle += seconds

    def refused(self, request_id: str, arrival_time: float, num_prompt_tokens: int, error: str) -> None:
        """A request that the engine would not take."""
        self._heard.append(
            RequestRecord(request_id, arrival_time, num_prompt_tokens, finish_reason="error", error=error)
        )

    @hookimpl
    def llmkit_step_finished(self, event: StepEvent) -> None:
        """Note the step, and the time of every token it brought."""
        self._heard.append((event, self._idle))
        self._idle = 0.0
        self.num_steps += 1
        self.num_new_tokens += sum(event.new_tokens.values())

    @hookimpl
    def llmkit_request_finished(self, event: RequestEvent) -> None:
        """Note how it ended. Its last token's time comes with the step's own event, right after this one."""
        self._heard.append(event)

    def _work_through(self) -> None:
        heard, self._heard = self._heard, []
        for one in heard:
            if isinstance(one, RequestRecord):
                self._requests[one.request_id] = one
            elif isinstance(one, RequestEvent):
                self._take_end(one)
            else:
                self._take_step(*one)

    def _take_step(self, event: StepEvent, idle: float) -> None:
        num_recomputed = self._take_rows(event)
        copies = event.plan.copies or BlockCopies((), ())
        self._steps.append(
            StepRecord(
                event.plan.step_id,
                event.planned_at,
                event.launched_at,
                event.landed_at,
                event.finished_at,
                idle,
                len(event.plan.scheduled),
                event.plan.num_tokens,
                self._take_tokens(event),
                num_recomputed,
                event.num_running,
                event.num_waiting,
                event.cache.num_used_blocks,
                event.cache.num_cached_blocks,
                event.cache.num_free_blocks,
                event.num_reserved_slots,
                event.num_unwritten_slots,
                event.sent_at,
                event.device_seconds,
                len(copies.saves),
                len(copies.restores),
            )
        )

    def _take_rows(self, event: StepEvent) -> int:
        """What was computed; returns how many positions had been computed before. Runs for every row of every step."""
        num_recomputed = 0
        requests = self._requests
        for request_id, _, start, num_tokens, _, _ in event.plan.scheduled:
            record = requests.get(request_id)
            if record is None or record.first_scheduled_time is None:
                record = self._record(request_id)
                record.first_scheduled_time = event.launched_at
                record.num_cached_tokens = record.num_computed_tokens = start
            known = record.num_computed_tokens
            if start >= known:
                record.num_computed_tokens = start + num_tokens
                continue
            end = start + num_tokens
            again = min(end, known) - start
            record.num_recomputed_tokens += again
            record.num_computed_tokens = max(end, known)
            num_recomputed += again
        return num_recomputed

    def _take_tokens(self, event: StepEvent) -> int:
        """When tokens came; returns how many."""
        num_new, landed_at, requests = 0, event.landed_at, self._requests
        for request_id, count in event.new_tokens.items():
            times = requests[request_id].token_times
            if count == 1:
                times.append(landed_at)
            else:
                times.extend([landed_at] * count)
            num_new += count
        return num_new

    def _take_end(self, event: RequestEvent) -> None:
        record = self._record(event.request_id)
        record.arrival_time = event.metrics.arrival_time
        record.num_prompt_tokens = event.num_prompt_tokens
        record.num_output_tokens = event.num_output_tokens
        record.num_preemptions = event.metrics.num_preemptions
        record.priority = event.priority
        record.deadline = event.deadline
        record.tenant = event.tenant
        record.finish_reason = event.finish_reason.value
        record.error = event.error
        record.finished_time = event.metrics.finished_time

    def _record(self, request_id: str) -> RequestRecord:
        record = self._requests.get(request_id)
        if record is None:
            record = self._requests[request_id] = RequestRecord(request_id)
        return record

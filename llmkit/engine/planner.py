"""The state machine: queues and token accounting. Torch-free; the scheduler only chooses.

`Planner.plan` asks the scheduler and returns plain data; `Planner.land` takes a step's result back in.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import chain

from llmkit.engine.residency import Residency
from llmkit.engine.scheduling import PlannedStep
from llmkit.engine.steady import SteadyDecode, is_at_full_length, is_decoding
from llmkit.engine.swapping import HostPool
from llmkit.errors import RequestError
from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.scheduler import RequestList, RequestQueue, RequestView, Scheduler
from llmkit.types import (
    Admission,
    BlockCopies,
    Edits,
    FinishReason,
    Request,
    RequestStatus,
    ScheduledRequest,
    StepPlan,
    StepResult,
)


class Planner:
    """Owns every live request, from `add` until `finish`.

    With `host` preempted ones may wait in host memory. Without `forks` none is forked, whatever the allocator can.
    """

    def __init__(
        self, scheduler: Scheduler, allocator: CacheAllocator, host: HostPool | None = None, forks: bool = True
    ) -> None:
        self.scheduler = scheduler
        self.allocator = allocator
        self.requests: dict[str, Request] = {}
        self._views: dict[str, RequestView] = {}
        self._waiting: list[RequestView] = []
        self._running: list[RequestView] = []
        self._held: dict[str, list[RequestView]] = {}
        self._queue = RequestQueue(RequestList(self._waiting), RequestList(self._running))
        self.host = host
        self._residency = Residency(allocator, scheduler.settings.max_num_seqs, host, forks)
        self._forks = self._residency.forks
        self.containment = self._residency.containment
        self.num_planned_steps = 0
        self._sampling: list[Request] = []
        self._steady: SteadyDecode | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._held.values()))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_unwritten_slots(self) -> int:
        """KV slots that running requests hold but that no launched step has written."""
        residency = self._residency
        return residency.num_held_blocks * residency.block_size - residency.num_scheduled_tokens

    def add(self, request: Request, after: str | None = None) -> None:
        """Queue `request` behind the others.

        `after` names a request with the same prompt and tenant. Where the cache forks or reuses prefixes, this one is
        held back until the other has computed the prompt or has ended, if they can share a block of it.
        """
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use")
        leader = self.requests.get(after) if after is not None else None
        if leader is not None:
            if (request.token_ids, request.tenant) != (leader.token_ids[: leader.num_prompt_tokens], leader.tenant):
                raise RequestError(f"request {request.request_id!r} has not the prompt and tenant of {after!r}")
            self._forks.add(request, leader)
        view = RequestView(request, self._residency.num_found_tokens)
        self.requests[request.request_id] = request
        self._views[request.request_id] = view
        if leader is not None and self._can_reuse(request, leader):
            self._held.setdefault(leader.request_id, []).append(view)
        else:
            self._waiting.append(view)

    def _can_reuse(self, request: Request, leader: Request) -> bool:
        """Whether there is a block that `leader` has yet to compute and `request` could take from it."""
        has_block = request.num_prompt_tokens > self.allocator.spec.block_size
        is_early = leader.num_computed_tokens < leader.num_prompt_tokens
        runs_whole = request.sampling_params.prompt_logprobs is not None
        can_share = self._forks.is_on or self.allocator.reuses_prefixes
        return can_share and has_block and is_early and not runs_whole

    def _let_go(self, request_id: str) -> None:
        """Queue those that were held back for a request, where their arrival puts them."""
        for view in self._held.pop(request_id, ()):
            later = (
                at
                for at, other in enumerate(self._waiting)
                if other.status is RequestStatus.WAITING and other.arrival_time > view.arrival_time
            )
            self._waiting.insert(next(later, len(self._waiting)), view)

    def plan(self, now: float) -> tuple[StepPlan | None, dict[Request, str]]:
        """Let the scheduler choose. Returns the plan, None when nothing runs, and rejected requests with reasons."""
        self._residency.retry()
        plan = self._repeat()
        if plan is not None:
            return plan, {}
        self._end_repeating()
        step = PlannedStep(self._residency, self.scheduler.settings.max_num_batched_tokens, now)
        try:
            self.scheduler.schedule(self._queue, step)
            edits, more_edits = self._edits(step)
        except BaseException:
            step.rollback()
            raise
        finally:
            step.close()
            self._update_queues(step)
        rejected = {view._request: reason for view, reason in step.rejected.items()} if step.rejected else {}
        return (self._compile(step, edits, more_edits) if step.grants else None), rejected

    def _repeat(self) -> StepPlan | None:
        """The step before once more, if the scheduler lets it go on and every running request is decoding."""
        num_running = len(self._running)
        if not self._sampling or not num_running or num_running > self.scheduler.settings.max_num_batched_tokens:
            return None
        if self.host is not None and self.host.has_to_save:
            return None
        if not self.scheduler.repeats(len(self._waiting), self._residency.num_free_slots):
            return None
        if self._steady is None:
            running = {view._request for view in self._running}
            ran = [request for request in self._sampling if request in running]
            others = running.difference(ran)
            if not all(map(is_decoding, ran)) or not all(map(is_at_full_length, others)):
                return None
            self._steady = SteadyDecode(ran, self._residency, self.num_planned_steps)
        try:
            plan = self._steady.plan()
        except BaseException:
            self._end_repeating()
            raise
        self.num_planned_steps += plan is not None
        return plan

    def _end_repeating(self) -> None:
        """From here on every row of a step is planned and landed by itself."""
        if self._steady is not None:
            self._steady.settle()
            self._steady = None

    def settle(self) -> None:
        """Bring the counters of all requests up to date: they lag behind while steps repeat."""
        if self._steady is not None:
            self._steady.settle()

    def _update_queues(self, step: PlannedStep) -> None:
        """The lists schedulers look at change only here, never while they look."""
        for view in step.admitted:
            self._waiting.remove(view)
        for view in step.preempted:
            if view in self._running:
                self._running.remove(view)
                self._waiting.insert(0, view)
        self._running.extend(step.admitted)

    def _edits(self, step: PlannedStep) -> tuple[Edits, tuple[Edits, ...]]:
        """What the device must hear of block tables, the first group's and others'; changes nothing, so that an
        allocator may fail here."""
        requests = [view._request for view in step.grants]
        grown = [one for one in requests if one.num_blocks > one.num_sent_blocks]
        return tuple([self._residency.edit(one) for one in grown]), self._residency.more_edits(grown)

    def _compile(self, step: PlannedStep, edits: Edits, more_edits: tuple[Edits, ...]) -> StepPlan:
        """Turn grants into plain data and mark their tokens as in flight."""
        step_id = self.num_planned_steps
        self.num_planned_steps += 1
        admissions = tuple([_admission(view._request) for view in step.admitted])
        rows: list[ScheduledRequest] = []
        num_samples = 0
        for view, num_tokens in step.grants.items():
            request = view._request
            start = request.num_computed_tokens + request.num_in_flight_tokens
            samples = start + num_tokens == request.num_tokens + request.num_pending_samples
            rows.append(ScheduledRequest(request.request_id, request.slot, start, num_tokens, samples, request.epoch))
            request.num_in_flight_tokens += num_tokens
            request.num_service_tokens += num_tokens
            request.num_pending_samples += samples
            num_samples += samples
            request.last_step_id = step_id
            request.num_sent_blocks = request.num_blocks
        self._residency.num_scheduled_tokens += sum(step.grants.values())
        self._sampling = [view._request for view in step.grants] if num_samples == len(rows) else []
        return StepPlan(step_id, tuple(rows), admissions, edits, self._copies(step_id, step, edits), more_edits)

    def _copies(self, step_id: int, step: PlannedStep, edits: Edits) -> BlockCopies | None:
        """What is copied for forks, to host memory and back; who starts has been sent its whole block table."""
        forked = [step.copies[view] for view in step.admitted if step.copies[view]]
        forks = [tuple(chain.from_iterable(group)) for group in zip(*forked, strict=True)] if forked else []
        copies = None
        if self.host is not None and (step.admitted or self.host.has_to_save):
            tables = {edit.slot: edit.blocks for edit in edits}
            copies = self.host.copies(step_id, [(view._request, tables[view._request.slot]) for view in step.admitted])
        if not any(forks):
            return copies
        return (copies or BlockCopies())._replace(forks=forks[0], more_forks=tuple(forks[1:]))

    def forget_saved(self, plan: StepPlan) -> None:
        """A step has failed as a whole: nobody can rely on what it was to save."""
        if self.host is not None:
            self.host.forget(plan.step_id)

    def lands_steadily(self, plan: StepPlan, result: StepResult) -> SteadyDecode | None:
        """Where `plan` can be landed as one of steps that repeat; None if its rows are to be looked at one by one."""
        if self._steady is None or not self._steady.owns(plan):
            return None
        if result.errors:
            self._end_repeating()
        return self._steady

    def land(self, plan: StepPlan, failed_rows: Container[int] = ()) -> list[Request | None]:
        """A step has run: its rows' KV is valid, but for failed ones. Stale rows (preempted, finished) give None."""
        if self._steady is not None and self._steady.owns(plan):
            self._end_repeating()
        landed: list[Request | None] = []
        requests, publish = self.requests, self._residency.publish
        for row, (request_id, _, start, num_tokens, samples, epoch) in enumerate(plan.scheduled):
            request = requests.get(request_id)
            if request is None or request.epoch != epoch:
                landed.append(None)
                continue
            request.num_in_flight_tokens -= num_tokens
            request.num_pending_samples -= samples
            request.num_computed_tokens = start + num_tokens
            if row not in failed_rows:
                publish(request, start + num_tokens)
            if self._held and request.num_computed_tokens >= request.num_prompt_tokens:
                self._let_go(request_id)
            landed.append(request)
        self._residency.land(plan.step_id)
        return landed

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a live request in whatever state it is; its blocks return once no step in flight names them."""
        view = self._views.pop(request.request_id)
        del self.requests[request.request_id]
        if request.status is RequestStatus.RUNNING:
            if self._steady is not None:
                self._steady.leave(request)
            self._running.remove(view)
            self._residency.leave(request)
        else:
            next(queue for queue in (self._waiting, *self._held.values()) if view in queue).remove(view)
            if self.host is not None:
                self.host.drop(request)
        self._let_go(request.request_id)
        self._forks.drop(request)
        request.status, request.finish_reason, request.error = RequestStatus.FINISHED, reason, error


def _admission(request: Request) -> Admission:
    return Admission(
        request.slot,
        request.request_id,
        tuple(request.token_ids),
        request.num_prompt_tokens,
        request.sampling_params,
        request.seed,
    )

"""One step being planned: the transactional object a scheduler acts through. Torch-free."""

from __future__ import annotations

from llmkit.engine.grouped_cache import Forked
from llmkit.engine.residency import Residency
from llmkit.errors import PluginError
from llmkit.interfaces.scheduler import DenialReason, Denied, Grant, RequestView, grant
from llmkit.types import RequestStatus

NO_BLOCKS = Denied(DenialReason.NO_BLOCKS)
NO_TOKENS = Denied(DenialReason.NO_TOKENS)
NO_SEQS = Denied(DenialReason.NO_SEQS)
NEVER_FITS = Denied(DenialReason.NEVER_FITS)
NO_WORK = Denied(DenialReason.NO_WORK)


class PlannedStep:
    """Implements `SchedulingStep`. A grant reserves KV for its tokens or changes nothing."""

    def __init__(self, residency: Residency, max_num_batched_tokens: int, now: float) -> None:
        self.now = now
        self.num_free_tokens = self._max_num_tokens = max_num_batched_tokens
        self.grants: dict[RequestView, int] = {}
        self.admitted: list[RequestView] = []
        self.preempted: list[RequestView] = []
        self.rejected: dict[RequestView, str] = {}
        self.copies: dict[RequestView, Forked] = {}
        self._residency = residency
        self._block_size = residency.block_size
        self._is_open = True

    @property
    def num_free_seqs(self) -> int:
        return self._residency.num_free_slots

    @property
    def num_free_blocks(self) -> int:
        return self._residency.num_unowned_blocks

    @property
    def num_reclaiming_blocks(self) -> int:
        return self._residency.num_reclaiming_blocks

    def num_missing_blocks(self, view: RequestView) -> int:
        """Blocks still to be found before every known token of a request has its place, a window of them at a time."""
        return self._residency.num_missing_blocks(view._request, self._max_num_tokens)

    def run(self, view: RequestView, max_tokens: int) -> Grant | Denied:
        """Grant up to `max_tokens` tokens of a request, admitting it if it waits."""
        request = view._request
        if request.status is not RequestStatus.RUNNING:
            return self._admit(view, max_tokens)
        start = request.num_computed_tokens + request.num_in_flight_tokens
        target = request.num_tokens + request.num_pending_samples
        num_tokens = min(target - start, max_tokens)
        if num_tokens <= 0 or target >= request.max_num_tokens or view in self.grants or not self._is_open:
            return self._no_work()
        if num_tokens > self.num_free_tokens:
            num_tokens = self.num_free_tokens
            if not num_tokens:
                return NO_TOKENS
        upto = start + num_tokens
        if upto > request.num_blocks * self._block_size:
            num_tokens = min(num_tokens, self._residency.num_fitting_tokens(request, start))
            if num_tokens <= 0:  # what is in flight has to land before the window moves on
                return NO_WORK
            if not self._residency.reserve(request, start + num_tokens):
                return NO_BLOCKS
        self.grants[view] = num_tokens
        self.num_free_tokens -= num_tokens
        return grant(num_tokens)

    def _admit(self, view: RequestView, max_tokens: int) -> Grant | Denied:
        request, residency = view._request, self._residency
        if not self._is_open or max_tokens <= 0 or view in self.rejected or request.status is RequestStatus.FINISHED:
            return self._no_work()
        if not self.num_free_tokens:
            return NO_TOKENS
        if not residency.num_free_slots:
            return NO_SEQS
        if view in self.preempted or residency.is_pinned(request):
            return NO_BLOCKS
        allocator, found = residency.allocator, residency.find(request)
        num_ready = found.num_ready
        num_fitting = residency.num_fitting_tokens(request, num_ready, found.num_pooled)
        num_tokens = min(request.num_tokens - num_ready, max_tokens, self.num_free_tokens, num_fitting)
        copies = residency.start(request, found, num_ready + num_tokens)
        if copies is None:
            stats = allocator.stats()
            return NO_BLOCKS if stats.num_used_blocks else NEVER_FITS
        residency.enter(request, found)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = request.num_ready_tokens = num_ready
        residency.num_scheduled_tokens += num_ready
        if not request.num_preemptions:
            request.num_cached_tokens = found.num_pooled
        request.num_recomputed_tokens += max(0, request.num_lost_tokens - num_ready)
        request.num_lost_tokens = 0
        self.admitted.append(view)
        self.copies[view] = copies
        self.grants[view] = num_tokens
        self.num_free_tokens -= num_tokens
        return grant(num_tokens)

    def preempt(self, view: RequestView) -> int:
        """Take a running request out, whether or not it has a grant in this step. Returns the blocks free now."""
        request = view._request
        self._check_open()
        if request.status is not RequestStatus.RUNNING:
            return 0
        self.num_free_tokens += self.grants.pop(view, 0)
        if view in self.admitted:
            self.admitted.remove(view)  # nothing has run since: what is kept in host memory stands
        else:
            self._residency.save(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        num_lost = request.num_computed_tokens + request.num_in_flight_tokens
        request.num_lost_tokens = max(request.num_lost_tokens, num_lost)
        self.preempted.append(view)
        return self._residency.leave(request)

    def reject(self, view: RequestView, reason: str) -> None:
        """End a waiting request with an error; one that has ended already is left alone."""
        self._check_open()
        if view._request.status is RequestStatus.RUNNING:
            raise PluginError(f"request {view.request_id!r} is running; preempt it before rejecting it")
        if view._request.status is not RequestStatus.FINISHED:
            self.rejected[view] = reason

    def close(self) -> None:
        """Nothing can be changed through this object any more."""
        self._is_open = False

    def rollback(self) -> None:
        """Undo admissions of a step whose scheduler raised: those requests never reached the device."""
        for view in self.admitted:
            self._residency.leave(view._request)
            view._request.status = RequestStatus.PREEMPTED if view.num_preemptions else RequestStatus.WAITING
        self.admitted.clear()
        self.grants.clear()

    def _no_work(self) -> Denied:
        self._check_open()
        return NO_WORK

    def _check_open(self) -> None:
        if not self._is_open:
            raise PluginError("this step is closed: act only inside `schedule`")
